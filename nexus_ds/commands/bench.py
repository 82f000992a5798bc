"""The verb `bench`: training speed against other layers, and how cost grows with the model.

Not covered: several processes and communication but in `links`, generating text.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.benchmarks import assembly_speed, data_speed, gpu
from nexus_ds.experiments.benchmarks.figures import growth_curves, speed_bars
from nexus_ds.outputs import new_directory, refuse_existing, write_text
from nexus_ds.progress import say
from nexus_ds.report.evaluation import write_csv
from nexus_ds.report.page import Table, text_table

if TYPE_CHECKING:
    import torch

    from nexus_ds.experiments.benchmarks.layer_speed import Speed
    from nexus_ds.experiments.benchmarks.models import Shape
    from nexus_ds.experiments.benchmarks.scaling import Point

# layer_speed, scaling, models and slow_links import torch; the options of `bench` are declared
# without them, so that `bench --help` waits for nothing.
SIZES = ("hidden", "layers", "heads", "ffn", "vocabulary", "experts", "top_k", "batch", "length")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `bench train` found, in the order of its JSON."""

    machine: dict[str, str | int]
    dtype: str
    baseline: str
    parts: list[str]
    """Of a step, in the order in which they are shown."""
    rows: list[Speed]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What `bench growth` found, in the order of its JSON."""

    machine: dict[str, str | int]
    dtype: str
    model: str
    rows: list[Point]
    exponents: dict[str, dict[str, float]]
    """By quantity: `seconds`, and `peak_bytes` where memory was measured."""
    router: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    train = commands.add_parser(
        "train", help="tokens/s of a Nexus layer, DeepSpeed's, transformers' and a dense model"
    )
    _add_model_arguments(train, preset="cpu", rounds=5)
    train.add_argument(
        "--baseline",
        default="dense",
        metavar="MODEL",
        help="what ratios are taken against (dense)",
    )
    train.add_argument(
        "--models", default="", metavar="A,B,...", help="only these (default: all uncompiled)"
    )
    scaling = commands.add_parser(
        "growth", help="step time and memory against experts, top-k, layers and sequence"
    )
    _add_model_arguments(scaling, preset="tiny", rounds=3)
    scaling.add_argument(
        "--model",
        default="nexus-loop",
        metavar="MODEL",
        help="what is grown (nexus-loop)",
    )
    data = commands.add_parser("data", help=data_speed.HELP)
    data_speed.add_arguments(data)
    assemble = commands.add_parser("assemble", help=assembly_speed.HELP)
    assembly_speed.add_arguments(assemble)
    links = commands.add_parser(
        "links",
        help="step times on slow links (Linux): overlapped and plain expert parallelism, "
        "ZeRO alone, and what plan expects",
    )
    add_links_arguments(links)
    everything = commands.add_parser(
        "gpu", help="all that only a GPU shows, in 8 minutes: tests, training, speed, memory"
    )
    gpu.add_arguments(everything)


# Of `train` and `growth`: both build models of one shape.
def _add_model_arguments(command: argparse.ArgumentParser, preset: str, rounds: int) -> None:
    command.add_argument(
        "--preset",
        default=preset,
        metavar="NAME",
        help=f"sizes: tiny, cpu or 470m ({preset})",
    )
    command.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda",
        help="where to compute (cpu)",
    )
    command.add_argument(
        "--dtype",
        default="",
        metavar="fp32|bf16",
        help="fp32 on a CPU, bf16 on a GPU",
    )
    command.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help=f"repetitions ({rounds})",
    )
    for size in SIZES:
        option = _option(size)
        command.add_argument(option, type=int, metavar="N", help=argparse.SUPPRESS)
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write JSONL, CSV and a figure there",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def add_links_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench links`."""
    parser.add_argument(
        "--rates",
        default="10Gb,1Gb,300Mb,100Mb",
        metavar="LIST",
        help="speeds of a rank's link (default: %(default)s)",
    )
    parser.add_argument(
        "--delay",
        default="0",
        metavar="TIME",
        help="from rank to rank, such as 1ms (default: none)",
    )
    for name, default, text in (
        ("ranks", 2, "ranks, no more than cores"),
        ("stage", 3, "ZeRO stage"),
        ("batch", 8, "sequences of 256 tokens a rank"),
        ("ffn", 512, "inner width of an expert"),
        ("steps", 5, "timed steps at each speed"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _option(size: str) -> str:
    return f"--{size.replace('_', '-')}"


def _shape(args: argparse.Namespace) -> Shape:
    from nexus_ds.experiments.benchmarks.models import preset

    given: dict[str, int] = {}
    for size in SIZES:
        value = getattr(args, size)
        if value is None:
            continue
        if value < 1:
            raise ConfigError(f"{_option(size)}: expected a number above 0, found {value}")
        given[size] = value
    shape = replace(preset(args.preset), **given)
    if shape.top_k > shape.experts:
        raise ConfigError(
            f"--top-k {shape.top_k} is more than the {shape.experts} experts; lower it"
        )
    if shape.hidden % shape.heads:
        raise ConfigError(
            f"--hidden {shape.hidden} is not a multiple of --heads {shape.heads}; "
            "change one of them"
        )
    return shape


def _place(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    from nexus_ds.checkpoint.build import DTYPES

    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: unknown device {args.device!r}; expected cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device on this machine; use --device cpu"
        )
    # what training uses there: few CPUs compute in bf16 faster than in fp32
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: unknown value {dtype!r}; expected {' or '.join(DTYPES)}")
    return torch.device(args.device), DTYPES[dtype]


def _known(option: str, names: list[str]) -> list[str]:
    from nexus_ds.experiments.benchmarks.models import COMPILED, VARIANTS

    known = [*VARIANTS, *COMPILED]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: unknown model {name!r}; expected {', '.join(known)}")
    return names


def _train(args: argparse.Namespace, shape: Shape) -> Comparison:
    from nexus_ds.experiments.benchmarks import layer_speed
    from nexus_ds.experiments.benchmarks.models import VARIANTS
    from nexus_ds.experiments.benchmarks.parts import STEP_PARTS

    (baseline,) = _known("--baseline", [args.baseline])
    asked = [name for name in args.models.split(",") if name]
    names = _known("--models", asked or list(VARIANTS))
    # ratios need it, whatever was asked for
    if baseline not in names:
        names = [baseline, *names]
    # deepspeed.moe has top-1 and top-2 gates alone
    if shape.top_k > 2:
        names = [name for name in names if not name.startswith("deepspeed")]
    device, dtype = _place(args)
    results, reading = layer_speed.measure(names, shape, device, dtype, args.rounds, say)
    speeds = layer_speed.summary(results, reading, shape, baseline, device)
    seen = {part for speed in speeds for part in speed.shares}
    return Comparison(
        machine=layer_speed.machine(device),
        dtype=str(dtype),
        baseline=baseline,
        parts=[part for part in STEP_PARTS if part in seen],
        rows=speeds,
    )


def _growth(args: argparse.Namespace, shape: Shape) -> Growth:
    from nexus_ds.experiments.benchmarks import layer_speed, scaling

    (model,) = _known("--model", [args.model])
    device, dtype = _place(args)
    rows = scaling.sweep(shape, model, device, dtype, args.rounds, say)
    rows += scaling.router_sweep(shape, device, dtype, args.rounds, say)
    return Growth(
        machine=layer_speed.machine(device),
        dtype=str(dtype),
        model=model,
        rows=rows,
        exponents=scaling.exponents(rows),
        router=scaling.router_law(rows),
    )


def _flat(row: Speed | Point) -> dict[str, object]:
    """Return a row of the CSV: numbers and words, and the shares of a step each on its own."""
    values = row.to_json()
    shares = values.get("shares", {})
    flat = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    if isinstance(shares, dict):
        flat |= {f"share {part}": share for part, share in shares.items()}
    return flat


def _write(out: Path, what: str, found: Comparison | Growth, about: dict[str, object]) -> None:
    """Write a line of JSON for each row, with all that holds for every row; the CSV; a figure."""
    common = {**about, **asdict(found)}
    del common["rows"]
    with new_directory(out) as folder:
        lines = [json.dumps({**row.to_json(), **common}) for row in found.rows]
        write_text(folder / f"{what}.jsonl", "\n".join(lines) + "\n")
        flat = [_flat(row) for row in found.rows]
        # models have different parts of a step: the columns are all that any has
        keys = list(dict.fromkeys(chain.from_iterable(flat)))
        cells = [[row.get(key, "") for key in keys] for row in flat]
        write_csv(folder / f"{what}.csv", keys, cells)
        if isinstance(found, Comparison):
            speed_bars(found.rows, found.parts, found.baseline, folder / "train.png")
        else:
            growth_curves(found.rows, found.exponents, folder / "growth.png")


def _aligned(grid: list[list[str]]) -> str:
    """Return a header and its rows as text."""
    header, *rows = grid
    return text_table(Table(header=header, rows=rows))


def _speed_cells(row: Speed) -> list[str]:
    cells = [
        row.model,
        f"{row.tokens_per_second:,.0f}",
        f"{row.ratio:.3f}",
        f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
        f"{row.parameters / 1e6:,.1f}M",
        f"{row.optimizer_seconds * 1e3:,.1f} ms",
        f"{row.active_tflops:.3g}",
    ]
    # Only of GPUs whose peak is known.
    return [*cells, f"{row.mfu:.1%}"] if row.mfu else cells


def describe_train(found: Comparison) -> str:
    """Return the comparison as text."""
    header = ["model", "tokens/s", "ratio", "range", "params", "AdamW", "TFLOPS"]
    if found.rows[0].mfu:
        header.append("MFU")
    speeds = [header]
    shares = [["share of the step", *found.parts]]
    for row in found.rows:
        speeds.append(_speed_cells(row))
        shares.append(_share_cells(row, found.parts))
    return f"{_aligned(speeds)}\n\n{_aligned(shares)}"


def _share_cells(row: Speed, parts: list[str]) -> list[str]:
    cells = [row.model]
    for part in parts:
        share = row.shares.get(part)
        # a dense model has no router: nothing, not 0 %
        cells.append("" if share is None else f"{share:.2%}")
    return cells


def describe_growth(found: Growth) -> str:
    """Return the sweeps and their exponents as text."""
    grid = [["quantity", "x", "ms a step", "peak MB"]]
    for row in found.rows:
        peak = f"{row.peak_bytes / 1e6:,.0f}" if row.peak_bytes else ""
        grid.append([row.quantity, str(row.x), f"{row.seconds * 1e3:,.2f}", peak])
    fits = [["exponent", "time", "memory"]]
    for quantity, fitted in found.exponents.items():
        memory = f"{fitted['peak_bytes']:.2f}" if "peak_bytes" in fitted else ""
        fits.append([quantity, f"{fitted['seconds']:.2f}", memory])
    router = _router_line(found.router)
    return f"{_aligned(grid)}\n\n{_aligned(fits)}\n{router}"


def _router_line(law: dict[str, float]) -> str:
    few_microseconds = law["token_seconds_few"] * 1e6
    few = f"{few_microseconds:.2f} µs a token for {law['few_tokens']:,} tokens"
    many_microseconds = law["token_seconds_many"] * 1e6
    many = f"{many_microseconds:.2f} for {law['many_tokens']:,}"
    expert_ms = law["expert_seconds"] * 1e3
    fixed_ms = law["fixed_seconds"] * 1e3
    expert = f"{expert_ms:+.3f} ms an expert on {fixed_ms:.2f} ms"
    fit = f"correlation with a straight line {law['correlation']:.2f}"
    return f"router of a layer with P: {few}, {many}; {expert} ({fit})"


def run(args: argparse.Namespace) -> int:
    """Measure, print, and with --out write."""
    if args.what == "data":
        return data_speed.run(args, say)
    if args.what == "assemble":
        return assembly_speed.run(args, say)
    if args.what == "gpu":
        return gpu.run(args)
    if args.what == "links":
        from nexus_ds.experiments.benchmarks import slow_links

        return slow_links.run(args)
    return _run_models(args)


def _run_models(args: argparse.Namespace) -> int:
    """Run `bench train` or `bench growth`."""
    if args.rounds < 1:
        raise ConfigError(f"--rounds: expected a number above 0, found {args.rounds}")
    # before minutes of measuring
    if args.out:
        refuse_existing(args.out)
    shape = _shape(args)
    found = _train(args, shape) if args.what == "train" else _growth(args, shape)
    about: dict[str, object] = {"preset": args.preset, "shape": asdict(shape)}
    if args.out:
        _write(args.out, args.what, found, about)
    if args.json:
        print_text(json.dumps({**about, **asdict(found)}))
        return 0
    machine = ", ".join(f"{key} {value}" for key, value in found.machine.items())
    what = f"{args.what}, preset {args.preset}, {shape.tokens} tokens a step, {found.dtype}"
    print_text(f"{what}; {machine}")
    print_text(describe_train(found) if isinstance(found, Comparison) else describe_growth(found))
    if args.out:
        print_text(
            f"wrote {args.out}; next: open {shlex.quote(str(args.out / (args.what + '.png')))}"
        )
    else:
        print_text("next: the same with --out DIR for JSONL, CSV and a figure")
    return 0
