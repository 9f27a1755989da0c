"""`benthic serve FOLDER`: an OpenAI-compatible server on this machine, until it is told to end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benthic.cli.engine_options import Parser, add_engine_options, engine_settings
from benthic.config.model import ModelConfig
from benthic.config.serve import Limits, ServeConfig
from benthic.errors import ConfigError
from benthic.log import logger

if TYPE_CHECKING:
    from benthic.serve.messages import Ready

_ENGINE = {
    "num_blocks": "blocks of the cache (default: what --memory-share holds)",
    "memory_share": "share of the free memory that the cache takes (default 0.8)",
    "block_size": "tokens of a block (default 64)",
    "max_sequences": "answers computed at once (default 256)",
    "max_step_tokens": "tokens of one call of the model (default 2048)",
    "draft_tokens": "tokens drafted a step with --speculative (default: one for each prediction layer)",
}
_KINDS = {"memory_share": float}


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; --limits.NAME sets a field of Limits."""
    parser = Parser(prog="benthic serve", description=__doc__, allow_abbrev=False)
    add_engine_options(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--api-key-file", type=Path, help="who sends none of its keys, one a line, is refused")
    parser.add_argument("--open", action="store_true", help="let other machines in without a key")
    parser.add_argument("--model-name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="how long the end waits for answers")
    for name, text in _ENGINE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_KINDS.get(name, int), help=text)
    for name, field in Limits.model_fields.items():
        kind = float if field.annotation is float else int
        parser.add_argument(f"--limits.{name.replace('_', '-')}", type=kind, help=f"default {field.default}")
    return parser


def main(arguments: list[str]) -> int:
    """Check everything, then listen."""
    options = make_parser().parse_args(arguments)
    try:
        from benthic.serve.keys import read_keys
        from benthic.serve.messages import Start
        from benthic.serve.server import serve
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed", "pip install 'benthic[serve]'"
        ) from None
    from benthic.text import Tokenizer

    model = ModelConfig.from_pretrained(options.folder)
    tokenizer = Tokenizer.from_folder(options.folder)
    if tokenizer.templates:
        tokenizer.chat_template()  # one that does not compile is told now, and not with every chat
    engine = engine_settings(options, _ENGINE)
    config = ServeConfig(
        host=options.host,
        port=options.port,
        model_name=options.model_name or options.folder.resolve().name,
        key_digests=read_keys(options.api_key_file) if options.api_key_file else (),
        open_to_all=options.open,
        drain_seconds=options.drain_seconds,
        limits=Limits(**_given(options, {f"limits.{name}": name for name in Limits.model_fields})),
    )
    start = Start(str(options.folder), options.device, options.dtype, options.speculative, engine.model_dump())
    _tell_beginning(config, model, options)
    serve(config, start, tokenizer, lambda ready: _tell_ready(config, ready, options.speculative))
    return 0


def _given(options: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    values = {field: getattr(options, name) for name, field in names.items()}
    return {field: value for field, value in values.items() if value is not None}


def _tell_beginning(config: ServeConfig, model: ModelConfig, options: argparse.Namespace) -> None:
    from benthic.plan.parameters import count_parameters

    count = count_parameters(model)
    logger.info("model    %s: %s parameters, %s a token", config.model_name, f"{count.total:,}", f"{count.active:,}")
    if config.key_digests:
        who = f"{len(config.key_digests)} API keys"
    else:
        who = "without a key" + (", open to other machines" if config.open_to_all else "")
    logger.info("address  http://%s:%d, %s; 503 until the model is loaded", config.host, config.port, who)


def _tell_ready(config: ServeConfig, ready: Ready, speculative: bool) -> None:
    tokens = ready.blocks * ready.block_size
    logger.info(
        "weights  %.2f GiB in %s on %s, loaded in %.1f s",
        ready.weight_bytes / 2**30,
        ready.dtype,
        ready.device,
        ready.load_seconds,
    )
    logger.info(
        "cache    %.2f GiB: %d blocks of %d tokens, %.1f KiB a token",
        tokens * ready.token_bytes / 2**30,
        ready.blocks,
        ready.block_size,
        ready.token_bytes / 2**10,
    )
    why = "the model's positions" if ready.longest == ready.positions else "the cache's size"
    logger.info(
        "context  at most %d tokens, by %s; %d such texts fit the cache", ready.longest, why, tokens // ready.longest
    )
    if ready.drafts:
        drafts = f"{ready.drafts} a step, by the model's prediction layers"
    elif speculative:
        drafts = "none: the model has no prediction layers"
    else:
        drafts = "none: --speculative was not given"
    logger.info("drafts   %s", drafts)
    logger.info("answers  at most %d at once; %d more may wait", ready.max_sequences, config.limits.queue)
    logger.info("ready    http://%s:%d/v1", config.host, config.port)
