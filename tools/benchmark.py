"""Speed and memory on the device it runs on, next to the user's figures for Ascend 910 and, if asked, to diffusers.

python tools/benchmark.py --version demo
python tools/benchmark.py --task unet_step --against diffusers --torch_python torch/bin/python --json speed.json
python tools/benchmark.py --version demo --task image_variation --sweep steps=5,10,20 --plot steps.png
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.benchmark.settings import (  # noqa: E402
    ALONE,
    NO_NETWORK,
    SAMPLED,
    SETTINGS,
    TASKS,
    Setting,
    setting_of,
)
from ip_adapter.cli.inference import DEMOS, EITHER, add_shortcut_flags  # noqa: E402
from ip_adapter.cli.parser import (  # noqa: E402
    Parser,
    add_config_flags,
    add_device_flags,
    checkpoint_file,
    config_from,
    existing_file,
    first_existing,
    in_range,
    multiple_of_8,
    output_file,
    output_folder,
    start_logging,
)
from ip_adapter.config import ROOT, InferenceConfig, ModelConfig  # noqa: E402
from ip_adapter.families import SD15, SDXL  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files import check_apart, printable, replacing, temporary_folder, write_text  # noqa: E402

REFERENCE = ROOT / "tests" / "record" / "reference_benchmark.py"
DEVICE_FLAGS = "device_target", "ms_mode", "dtype", "cpu_threads"
SHORTCUTS = "guidance_start", "guidance_end", "deep_every"
# Two sides may hold so much of the memory. What a process is seen to hold is less than it needs once memory is short.
MEMORY_SHARE = 0.85
SWEPT = {"size": ("H", "W"), **{flag: (flag,) for flag in ("batch_size", "steps", *SHORTCUTS)}}  # flags it stands for


def main(argv: list | None = None) -> None:
    """Parse the flags, time every task in processes of its own, print the table."""
    version, config = config_from(argv, EITHER)
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, action="append", help="what to time, may be repeated (default: all)")
    add("--weights", type=checkpoint_file, help="merged checkpoint (default: the demo model, or seeded stand-ins)")
    add("--standins", type=output_folder, help="folder to keep the seeded stand-ins in, 16 GB for 1.5 and 52 GB for xl "
                                      "(default: a temporary one, where task merge writes 6 and 23 GB more)")
    add("--batch_size", type=in_range(int, 1, 10000), help="pictures at once (default: the document's)")
    add("--H", type=multiple_of_8, help="height in pixels (default: the document's)")
    add("--W", type=multiple_of_8, help="width in pixels (default: the document's)")
    add("--steps", type=in_range(int, 1, 1000), help="denoising steps (default: the document's)")
    add("--repeat", type=in_range(int, 1, 100), default=3, help="how often each is timed, after a first time")
    add("--against", choices=["diffusers"], help="the same work there, in turns, or "
        "afterwards if memory does not hold both")
    add("--torch_python", type=existing_file, default=sys.executable, help="Python that has torch and diffusers")
    add("--sweep", type=sweep, default=("", [None]), metavar="WHAT=N,N,...",
        help=f"one row for each value of {', '.join(SWEPT)}; size is height and width")
    add("--operators", type=in_range(int, 1, 1000), help="name so many kinds of operators under each row, those that "
        "take longest, from once more under the profiler (on the CPU)")
    add("--json", type=output_file, help="file to write all figures to")
    add("--plot", type=output_file, help=".png to draw seconds and memory over the values of --sweep into")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add_config_flags(parser, version, EITHER)
    add_device_flags(parser, "0")
    add_shortcut_flags(parser)
    args = parser.parse_args(argv)
    start_logging(args.log_level)
    if args.worker:
        serve(args, config)
        return
    if args.against and args.weights:
        raise UserError("--against diffusers works on the seeded stand-ins; leave out --weights")
    swept, values = args.sweep
    shorter = [flag for flag in SHORTCUTS if flag == swept or getattr(args, flag) is not None]
    if args.against and shorter:
        raise UserError("--against diffusers times the same work, and there nothing is left out; leave out "
                        f"{shorter[0]}")
    known = [s.task for s in SETTINGS if s.version == version]
    unknown = [task for task in args.task or () if task not in known]
    if unknown:
        raise UserError(f"--task {unknown[0]} is not there for --version {version}, expected one of {', '.join(known)}")
    whole = [task for task in args.task or () if shorter and task not in SAMPLED]
    if whole:
        raise UserError(f"--task {whole[0]} has nothing that {shorter[0]} leaves out; it shortens "
                        f"{', '.join(SAMPLED)}")
    check_outputs(args)
    if args.plot and not swept:
        raise UserError("--plot has nothing to draw over; give --sweep, such as --sweep batch_size=1,2,4")
    idle = [task for task in args.task or () if args.operators and task in NO_NETWORK]
    if idle:
        raise UserError(f"--operators are those of a network run by the benchmark itself; leave out --task "
                        f"{', '.join(idle)}")
    unasked = [task for task in known if (not args.against or task not in ALONE) and (not shorter or task in SAMPLED)
               and (not args.operators or task not in NO_NETWORK)]
    from ip_adapter.benchmark.report import COLUMNS, operator_lines, plot, table_line
    with ExitStack() as stack:
        temporary = stack.enter_context(temporary_folder(tempfile.gettempdir()))
        folder = args.standins or temporary
        if not args.weights:
            demo = version in DEMOS and not args.against
            args.weights = first_existing(config.ckpt_path, "--weights") if demo else write_weights(version, folder)
        rows = []
        logging.info("%s", " ".join(f"{name:>{width}}" for name, width in COLUMNS))
        for task, value in itertools.product(args.task or unasked, values):
            for name in SWEPT.get(swept, ()):
                setattr(args, name, value)
            rows.append(measure(args, task, folder, config.model, temporary))
            print("\n".join([table_line(rows[-1], f"{swept}={value}" if swept else ""),
                             *operator_lines(rows[-1], args.operators)]), flush=True)
            if args.json:
                write_text(args.json, json.dumps({"rows": rows}, indent=1) + "\n")
            if args.plot:
                with replacing(args.plot) as file:
                    plot(rows, swept).save(file, "PNG")


def check_outputs(args: argparse.Namespace) -> None:
    """Check what --json and --plot name: neither a file that is read, nor both the same.

    Raises:
        UserError: it cannot be written as it should be.
    """
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {printable(args.plot)}: expected a name that ends in .png")
    if args.plot and args.json and args.plot.resolve() == args.json.resolve():
        raise UserError(f"--plot {printable(args.plot)}: is the file of --json; name another file")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path:
            check_apart(path, f"--{name}", {"--weights": args.weights, "--config": args.config,
                                            "--torch_python": args.torch_python})


def sweep(text: str) -> tuple:
    """An argparse type: what is varied, and its values."""
    name, _, values = text.partition("=")
    if name not in SWEPT or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not known, expected such as batch_size=1,2,4 with "
                                         f"{' or '.join(SWEPT)}")
    kind = (multiple_of_8 if name == "size" else in_range(float, 0, 1) if name.startswith("guidance") else
            in_range(int, 1, 10000))
    return name, [kind(value) for value in values.split(",")]


def write_weights(version: str, folder: Path) -> Path:
    """Stand-ins in the sizes of a version, made once a folder, and the file they are merged into."""
    merged = folder / f"merged-{version}.safetensors"
    if not merged.exists():
        from ip_adapter.benchmark.tasks import SIZES
        from ip_adapter.weights.dummy import write_standins
        from ip_adapter.weights.merging import merge
        logging.info("writing stand-ins of %s into %s", version, folder)
        family = SDXL if version.startswith("xl") else SD15
        merge(family, **write_standins(folder / version, SIZES[version], family=family), out=merged)
    return merged


def serve(args: argparse.Namespace, config: InferenceConfig) -> None:
    """Load, then do the work once for every line of standard input and answer with one of JSON; its operators too, if
    the line says so."""
    from ip_adapter.benchmark.operators import operator_times
    from ip_adapter.benchmark.tasks import peak_memory, prepare
    from ip_adapter.inference.run import shortcuts
    from ldm.device import default_dtype, start_device
    start_device(args.device_target, 0 if args.ms_mode is None else args.ms_mode, args.cpu_threads)
    loaded, work = prepare(setting_from(args, args.task[0]), args.weights, config, args.dtype or default_dtype(),
                           given(args, "config", *DEVICE_FLAGS, *SHORTCUTS), functools.partial(shortcuts, args))
    print(json.dumps({"load_seconds": loaded}), flush=True)
    for line in sys.stdin:
        if line.strip() == "operators":
            print(json.dumps({"operators": operator_times(work)}), flush=True)
            continue
        seconds, stepping = work()
        print(json.dumps({"seconds": seconds, "stepping": stepping, "peak_memory_bytes": peak_memory()}), flush=True)


def setting_from(args: argparse.Namespace, task: str) -> Setting:
    """What the flags make of a task's setting."""
    return setting_of(task, args.version, batch_size=args.batch_size, height=args.H, width=args.W, steps=args.steps)


def given(args: argparse.Namespace, *flags: str) -> list:
    """The words of a command line that set these flags as here; those without a value are left out."""
    return [word for flag in flags if getattr(args, flag) is not None for word in (f"--{flag}", getattr(args, flag))]


def take_turns(processes: list, times: int, profiled: bool, bounded: bool, temporary: Path) -> list:
    """Start processes and let each do its work so often, the first once more for its operators, if asked.

    That is in turns, so that a change of the machine's speed meets all of them. If they turn out to hold more than
    MEMORY_SHARE, and are `bounded` by it, mapped weights would be read from disk again and again: then it is one after
    the other.
    """
    from ip_adapter.benchmark.report import Side
    from ip_adapter.benchmark.tasks import physical_memory
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(words, temporary)) for words in processes]
        for side in sides:
            side.work()
        held = sum(side.replies[0]["peak_memory_bytes"] for side in sides)
        if len(sides) == 1 or not bounded or held <= MEMORY_SHARE * physical_memory():
            for _ in range(times - 1):
                for side in sides:
                    side.work()
            if profiled:
                sides[0].profile()
            return sides
    logging.info("both sides hold %.1f GiB, too much for this machine: one after the other", held / 2**30)
    return [side for n, words in enumerate(processes)
            for side in take_turns([words], times, profiled and n == 0, True, temporary)]


def measure(args: argparse.Namespace, task: str, standins: Path, model: ModelConfig, temporary: Path) -> dict:
    """One row: the work here, and if asked there; `temporary` is for the files of the processes that do it."""
    setting = asdict(setting_from(args, task))
    processes = [[sys.executable, __file__, "--worker", "--task", task,
                  *given(args, "version", "batch_size", "H", "W", "steps", "weights", "config", *DEVICE_FLAGS,
                         *SHORTCUTS)]]
    if args.against and task not in ALONE:
        full = [word for key in ("task", "version", "batch_size", "height", "width", "steps")
                for word in (f"--{key}", setting[key])]
        full += [word for key in ("num_heads", "num_head_channels", "norm_groups")
                 for word in (f"--{key}", getattr(model, key))]
        processes.append([args.torch_python, REFERENCE, *full, "--standins", standins / args.version, "--threads",
                          args.cpu_threads])
    times = 1 if task in ("load", "merge") else args.repeat + 1
    # A command holds nothing between its turns.
    sides = take_turns(processes, times, args.operators is not None, task not in NO_NETWORK, temporary)
    by_step = task.startswith("train") or task in ("unet_step", "read")  # others make a batch in all their steps
    images = setting["batch_size"] * (setting["steps"] if by_step else 1)
    steps = 1 if task == "command" else setting["steps"]  # what a command takes is not its steps alone
    ours, *other = (side.figures(steps, images) for side in sides)
    row = {**{key: value for key, value in setting.items() if not key.endswith("per_second")},
           **{flag: getattr(args, flag) for flag in SHORTCUTS}, **ours, "operators": sides[0].operators,
           "ascend_910": {key: setting[key] for key in ("steps_per_second", "images_per_second")}}
    if task in ("load", "merge"):  # neither has steps
        row.update(seconds_per_step=None, steps_per_second=None, images_per_second=None)
    if other:
        row["diffusers"] = other[0]
        row["ratio"] = ours["seconds_per_step"] / other[0]["seconds_per_step"]
    return row


if __name__ == "__main__":
    run_script(main)
