"""`vhead convert`: a value head, alone or with its language model, from any framework's format to another's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vhead.cli.failure import reported
from vhead.cli.terminal import say, show

if TYPE_CHECKING:
    from vhead.formats import Detection


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint's folder, or one file with a head.")],
    destination: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DST]",
            help="A folder, for head and language model; or a file for the head: .safetensors, .bin, .pt or .pth.",
        ),
    ] = None,
    *,
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format", "-f", help="The format to write. Default: trl, or vhead if TRL's layout cannot hold the head."
        ),
    ] = None,
    source_format: Annotated[
        str | None,
        typer.Option("--from", help="The format to read. Default: the one that the checkpoint shows signs of."),
    ] = None,
    detect: Annotated[bool, typer.Option("--detect", help="Only say what SRC holds, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files of DST.")] = False,
) -> None:
    """Convert a trained value head between the formats of frameworks, with its language model or alone.

    Formats: trl, vhead, llama-factory, trlx, internlm2, deepspeed-chat, xtuner, unirl, openrlhf, qwen,
    hf-sequence-classification, hf-token-classification, armorm, beaver, nemo, megatron, verl-megatron.

    In a folder, the language model's tensors get the names that transformers expects, the configuration names the
    class, and tokenizer files are copied. The folder appears under its name when it is complete.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.

    **Examples**

    - `vhead convert ./openrlhf-critic --detect`
    - `vhead convert ./openrlhf-critic ./critic --format trl`
    - `vhead convert ./reward-model value_head.safetensors --format llama-factory`
    """
    if (destination is None) != detect:
        problem = "expected DST, or --detect alone" if destination is None else "writes nothing, so leave DST out"
        raise typer.BadParameter(problem, param_hint="DST" if destination is None else "--detect")
    with reported():
        _check_formats(format_name, source_format)
        if destination is None:
            _show(source, source_format)
        else:
            _convert(source, destination, format_name, source_format, force=force)


def _check_formats(format_name: str | None, source_format: str | None) -> None:
    from vhead.formats import FORMATS  # imports torch

    known = [head_format.name for head_format in FORMATS]
    for name, hint in ((format_name, "--format"), (source_format, "--from")):
        if name is not None and name not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {name!r}", param_hint=hint)


def _show(source: Path, source_format: str | None) -> None:
    from vhead import formats  # imports torch

    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    detection = formats.detect(source, format=source_format)
    head = formats.load(source, format=source_format)
    show(_described(source, detection))
    show(f"tensors      {', '.join(detection.tensors)}")
    show(f"hidden size  {head.hidden_size}")
    show(f"projections  {len(head.layers)}")
    show(f"outputs      {head.num_outputs}")
    if head.support is not None:
        show(f"support      {head.support.bins} bins from {head.support.low:g} to {head.support.high:g}")
    if head.activation is not None:
        show(f"activation   {head.activation}, of a classifier of each state")
    if detection.body_prefix:
        show(f"body prefix  {detection.body_prefix}")
    if head.std is not None:
        show(f"rewards      mean {head.mean or 0.0:g}, standard deviation {head.std:g}")


def _convert(
    source: Path, destination: Path, format_name: str | None, source_format: str | None, *, force: bool
) -> None:
    from vhead import formats  # imports torch

    done = formats.convert(source, destination, format_name, source_format=source_format, overwrite=force)
    say(_described(source, done.detection))
    say(f"{done.path}: written as {done.format}: {', '.join(done.files)}")
    for note in done.notes:
        say(note)


def _described(source: Path, detection: "Detection") -> str:
    return f"{source}: {detection.format}: {detection.reason}"
