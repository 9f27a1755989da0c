"""`benthic plan`: what it prints, what it refuses, and that it needs neither torch nor rich to answer in JSON."""

import json
import subprocess
import sys

import pytest

import benthic
from benthic.cli.main import main
from benthic.model import LanguageModel, initialise
from tests.plan.configs import SMALL as PLANNED

SMALL = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def folder(tmp_path):
    def write(**changes):
        config = {key: value for key, value in (SMALL | changes).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def run(*arguments):
    return main(["plan", *arguments])


def test_json_holds_the_plan(capsys):
    assert run("deepseek-v3", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == 671_026_419_200


def test_json_of_several_models_is_a_list(capsys):
    assert run("deepseek-v3", "--compare", "deepseek-v2", "--json", "--explain") == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["model"] for plan in plans] == ["deepseek-v3", "deepseek-v2"]
    assert all(plan["explain"]["lines"] for plan in plans)


def test_tables_show_the_figures(capsys):
    assert run("deepseek-v3") == 0
    text = capsys.readouterr().out
    for figure in ("671,026,419,200", "36,625,618,432", "70,272", "3,997,696", "250.5", "281.2"):
        assert figure in text


def test_explain_shows_formula_and_numbers(capsys):
    assert run("deepseek-v3", "--explain") == 0
    text = capsys.readouterr().out
    assert "= (C + R)*L" in text
    assert "= (512 + 64)*61" in text
    assert "attention core" in text


def test_compare_puts_models_side_by_side(capsys):
    assert run("deepseek-v3", "--compare", "llama-3.1-405b", "qwen2.5-72b") == 0
    text = capsys.readouterr().out
    for figure in ("70,272", "516,096", "327,680"):
        assert figure in text


def test_a_folder_is_planned(folder, capsys):
    assert run(folder(), "--json", "--device", "cpu", "--context", "64") == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"]["bytes_per_token"] == 2 * 2 * 16 * 2 * 2


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8"])
def test_a_folder_s_weights_are_what_was_planned(tmp_path, capsys, weights):
    model = LanguageModel(PLANNED["v3"])
    initialise(model, 0)
    benthic.save_model(model, tmp_path / "model", weights=weights)
    assert run(str(tmp_path / "model"), "--context", "32", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["folder"] == {"parameters": plan["parameters"]["stored"], "bytes": plan["memory"]["stored_bytes"]}
    assert run(str(tmp_path / "model"), "--context", "32") == 0
    assert "this folder, by its headers" in capsys.readouterr().out


def test_a_damaged_folder_is_refused(tmp_path, folder, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    assert run(folder()) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_expert_load_shows_what_balancing_and_the_group_limit_do(folder, capsys):
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "n_shared_experts": 1}
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    groups = {"n_group": 4, "topk_group": 2, "num_key_value_heads": 4}
    rest = {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "q_lora_rank": 16}
    path = folder(model_type="deepseek_v3", **experts, **latent, **groups, **rest)
    assert run(path, "--expert-load", "--json") == 0
    loads = json.loads(capsys.readouterr().out)["expert_load"]
    found = {(one["routing"], one["group_limit"]): one for one in loads}
    assert len(found) == 6
    assert found["balanced", True]["max_violation"] < found["skewed", True]["max_violation"]
    assert found["random", True]["nodes_per_token"] < found["random", False]["nodes_per_token"]
    assert run(path, "--expert-load") == 0
    assert "balanced" in capsys.readouterr().out


def test_replay_stands_beside_the_published_cost(capsys):
    assert run("--replay", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    hours = next(one for one in found["comparisons"] if one["name"] == "pretraining")
    assert hours["published"] == 2.664e6
    assert 0.85 < hours["ratio"] < 1.15
    assert found["assumptions"]
    assert run("--replay") == 0
    assert "2,664,000" in capsys.readouterr().out


def test_a_layout_is_planned(capsys):
    layout = "pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64"
    assert run("deepseek-v3", "--device", "h800", "--layout", layout, "--sequences", "15360", "--explain") == 0
    text = capsys.readouterr().out
    assert "Training on 2,048 x h800" in text
    assert "pipeline, dualpipe = (16 / 2 - 1) (FB + B - 3 W)" in text


def test_a_search_finds_a_layout_for_the_gpus_there_are(capsys):
    assert run("deepseek-v2-lite", "--gpus", "8", "--objective", "least_time", "--json") == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["fits"]
    assert training["gpus"] <= 8


def test_list_names_presets_and_devices(capsys):
    assert run("--list") == 0
    text = capsys.readouterr().out
    assert "deepseek-v3" in text
    assert "NVIDIA H200" in text
    assert run("--list", "--json") == 0
    assert "h800" in json.loads(capsys.readouterr().out)["devices"]


def test_what_does_not_fit_is_said(capsys):
    assert run("deepseek-v3", "--gpus", "4") == 0
    assert "does not fit on 4 x h100; 16 x h100 hold it" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_writes_a_picture(tmp_path, capsys, suffix):
    path = tmp_path / f"plan.{suffix}"
    assert run("deepseek-v2-lite", "--plot", str(path)) == 0
    assert path.stat().st_size > 1000
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_plot_of_several_models(tmp_path, capsys):
    path = tmp_path / "plan.svg"
    assert run("deepseek-v2-lite", "--compare", "qwen2.5-72b", "--plot", str(path)) == 0
    assert "<svg" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no MODEL given\nhint: benthic plan --list"),
        (["deepseek-v33"], "'deepseek-v33' is neither a preset nor a folder"),
        (["deepseek-v3", "--device", "h20"], "unknown device 'h20'; allowed: a100, b200, cpu, h100, h200, h800"),
        (["deepseek-v3", "--serving-gpus", "3"], "gpus is 3; it must divide n_routed_experts (256)"),
        (["deepseek-v3", "--layout", "pp=3,fsdp=8,ep=3"], "expert is 3; it must divide the ranks"),
        (["deepseek-v3", "--layout", "fsdp=8", "--gpus", "16"], "layout 'fsdp=8' is for 8 GPUs, but gpus is 16"),
        (["deepseek-v3", "--objective", "least_time", "--gpus", "8"], "no layout of up to 8 NVIDIA H100"),
        (["deepseek-v3", "--tokens", "inf"], "tokens: Input should be a finite number (given inf)"),
        (["deepseek-v3", "--tokens", "nan"], "tokens: Input should be"),
        (["deepseek-v2", "--replay"], "--replay predicts the run of deepseek-v3; MODEL is 'deepseek-v2'"),
        (["olmo2-7b", "--expert-load"], "the model has no routed experts"),
        (["deepseek-v3", "--batch", "0"], "batch: Input should be greater than 0 (given 0)"),
        (["deepseek-v3", "--context", "-5"], "context: Input should be greater than 0 (given -5)"),
        (["deepseek-v3", "--batch", "many"], "argument --batch: invalid int value: 'many'"),
        (["deepseek-v3", "--cache", "fp7"], "argument --cache: invalid choice: 'fp7'"),
        (["olmo2-7b", "--cache", "fp8_ds_mla"], "cache format 'fp8_ds_mla' is for latent attention; this is mha"),
        (["deepseek-v3", "--weights", "fp8", "--device", "a100"], "device 'a100' has no fp8 arithmetic"),
        (["deepseek-v3", "--acceptance", "1.5"], "acceptance: Input should be less than or equal to 1 (given 1.5)"),
        (["deepseek-v3", "--unknown"], "unrecognized arguments: --unknown"),
        (["deepseek-v3", "--plot", "plan.bmp"], "cannot plot into plan.bmp: the suffix is 'bmp'\nhint: allowed: png"),
        (["deepseek-v3", "--plot", "/proc/none/plan.png"], "cannot write /proc/none/plan.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_user_s_mistake_is_a_message_and_code_2(arguments, message, capsys):
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', which benthic does not hold"),
        ({"model_type": None}, "model_type is None, which benthic does not hold"),
        ({"hidden_size": None}, "missing: hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: Input should be greater than 0 (given 0)"),
        ({"vocab_size": -1}, "vocab_size: Input should be greater than 0 (given -1)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads (4)"),
        ({"compress_ratios": [4]}, "unknown key 'compress_ratios' in a llama config"),
    ],
    ids=lambda value: str(value),
)
def test_a_config_it_does_not_know_is_refused_and_never_guessed(folder, changes, message, capsys):
    assert run(folder(**changes)) == 2
    assert message in capsys.readouterr().err


def test_json_needs_neither_torch_nor_rich_nor_matplotlib():
    code = "import sys; from benthic.cli.main import main; main(['plan', 'deepseek-v3', '--json']); "
    code += "heavy = {'torch', 'rich', 'matplotlib', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--list", "--gpus", "8"], ["--replay", "--device", "h100"], ["tiny", "--expert-load", "--plot", "load.png"]],
)
def test_a_setting_that_would_do_nothing_is_refused(arguments, capsys):
    assert main(["plan", *arguments]) == 2
    assert f"takes no settings; {arguments[-2]} would do nothing" in capsys.readouterr().err
