"""`benthic plan`: what it prints, what it refuses, and that it needs neither torch nor rich to answer in JSON."""

import json
import subprocess
import sys

import pytest

from benthic.cli.main import main

SMALL = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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
    code += (
        "heavy = {'torch', 'rich', 'matplotlib', 'transformers', 'tyro'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
