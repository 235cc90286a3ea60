"""`python -m stca.examples.train`: train on the generated log or on `--log FILE`, and write a checkpoint with its AUC.

Progress goes to stderr, the result to stdout, with `--json` as one JSON object. Exit codes: 0 done, 2 bad usage or
input.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stca.errors import StcaError
from stca.examples.train.evaluate import AucRow, as_text, auc_rows, auc_table, base_rates
from stca.examples.train.log import Log
from stca.examples.train.logfile import read_log
from stca.examples.train.sampler import LengthSampler
from stca.examples.train.traced import log_trace
from stca.examples.train.train import TrainOptions, attend_to_alike, fit, model_config, score_with
from stca.examples.train.world import World, generate
from stca.export.reference.checkpoint import save_checkpoint
from stca.export.reference.module import Stca
from stca.trace import TraceWriter

TRAINING_KEY = "stca.training"
AUC_KEY = "stca.auc"

# The generated training log: enough users that none comes by more than once or twice, and not the evaluation's.
TRAINING_USERS = 1500
TRAINING_REQUESTS_EACH = 16
TRAINING_SEED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, save; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    try:
        result, rows = run(args, "python -m stca.examples.train " + shlex.join(argv))
    except StcaError as e:
        if args.debug:
            raise
        return _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; no checkpoint was written", 130)
    except Exception as e:
        if args.debug:
            raise
        return _fail(f"unexpected {type(e).__name__}: {e}; run it again with --debug and report it", 2)
    print(json.dumps(result) if args.json else f"{as_text(rows)}\n{result['checkpoint']}")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"stca.examples.train: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(args: argparse.Namespace, command: str) -> tuple[dict[str, Any], list[AucRow]]:
    """The work behind the command line: what was trained and how, as the JSON result says it; and its AUC table."""
    options = TrainOptions(
        steps=args.steps,
        requests=args.requests,
        targets=args.targets,
        lengths=LengthSampler(shortest=args.shortest, longest=args.longest),
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    if not args.out.parent.is_dir():
        raise StcaError(f"--out {args.out}: there is no directory {args.out.parent}; make it first")
    if args.out.is_dir():
        raise StcaError(f"--out {args.out}: is a directory; name a file in it")
    if args.trace and not args.log:
        raise StcaError("--trace: is of a --log; `stca calibrate --trace demo` has the generated one's")
    if args.trace and Path(args.trace).exists():
        raise StcaError(f"--trace {args.trace}: is there already; name a new folder")
    log, least_history = _log(args, options)
    torch.set_num_threads(args.threads)
    torch.manual_seed(options.seed)
    model = Stca(model_config(log, width=args.width, heads=args.heads, layers=args.layers, time=args.time))
    attend_to_alike(model)
    started = time.monotonic()
    losses = fit(model, log, options, least_history=least_history, progress=_say)
    training = {
        "command": command,
        "seed": options.seed,
        "steps": options.steps,
        "max_history": options.lengths.longest,
        "loss": round(sum(losses[-100:]) / len(losses[-100:]), 5),
        "seconds": round(time.monotonic() - started, 1),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    rows = _evaluated(args, model, log)
    auc = [row.as_dict() for row in rows]
    save_checkpoint(args.out, model, {TRAINING_KEY: json.dumps(training), AUC_KEY: json.dumps(auc)})
    if args.trace:
        with TraceWriter(args.trace) as writer:
            for request in log_trace(log, max(_lengths(args)), request_time=args.time == "delta"):
                writer.add(request)
    parameters = sum(p.numel() for p in model.parameters())
    return {"checkpoint": str(args.out), "parameters": parameters, **training, "auc": auc}, rows


def _log(args: argparse.Namespace, options: TrainOptions) -> tuple[Log, int]:
    """What is trained on, and how many events are before each of its requests at least."""
    if args.log:
        log = read_log(args.log, dict(args.task), held_out=args.held_out)
        if not log.held_out_requests():  # said before the training, not after it
            raise StcaError(
                f"{args.log}: no user has enough events for --held-out {args.held_out} to hold one out for the "
                "evaluation (the share is rounded down); raise it"
            )
        return log, options.lengths.shortest
    world = World()
    page = world.config.page
    if page % options.targets:
        raise StcaError(f"--targets {options.targets}: a generated request has {page}, on one device; take a divisor")
    _say("generating the log")
    # Whole generated requests, so that the targets cut behind them are never of two devices.
    least_history = -(-options.lengths.longest // page) * page
    history = least_history + TRAINING_REQUESTS_EACH * options.targets
    return generate(world, users=TRAINING_USERS, history=history, targets=0, seed=TRAINING_SEED).log, least_history


def _evaluated(args: argparse.Namespace, model: Stca, log: Log) -> list[AucRow]:
    score, request_time = score_with(model), args.time == "delta"
    if args.log:
        return auc_rows(score, log, _lengths(args), base_rates(log), request_time=request_time, progress=_say)
    return auc_table(
        score,
        _lengths(args),
        users=args.eval_users,
        targets=args.eval_targets,
        world=World(),
        request_time=request_time,
        progress=_say,
    )


def _lengths(args: argparse.Namespace) -> list[int]:
    """History lengths of the AUC table."""
    return args.eval_history or ([16, 64, 256, 1024] if args.log else [512, 1024, 2048, 4096, 10_000])


def _parser() -> argparse.ArgumentParser:
    defaults = TrainOptions()
    p = argparse.ArgumentParser(prog="python -m stca.examples.train", description=__doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint to write (safetensors)")
    p.add_argument("--log", type=Path, metavar="FILE", help="CSV or TSV log to train on, instead of the generated one")
    p.add_argument(
        "--task",
        type=_task,
        action="append",
        default=[],
        metavar="NAME=ACTION,…",
        help="with --log: actions that are a positive of task NAME; once per task",
    )
    p.add_argument("--trace", metavar="DIR", help="with --log: write the evaluation's requests there, to calibrate on")
    p.add_argument(
        "--held-out",
        type=_rate,
        default=0.2,
        metavar="SHARE",
        help="with --log: share of each user's events, the last ones, to evaluate on",
    )
    model = p.add_argument_group("model")
    model.add_argument("--width", type=_count, default=64)
    model.add_argument("--heads", type=_count, default=2)
    model.add_argument("--layers", type=_count, default=2)
    model.add_argument("--time", choices=("log", "delta"), default="log", help="delta: tokens know the request's time")
    training = p.add_argument_group("training")
    training.add_argument("--steps", type=_count, default=defaults.steps)
    training.add_argument("--requests", type=_count, default=defaults.requests, help="requests per step")
    training.add_argument("--targets", type=_count, default=defaults.targets, help="targets per request at most")
    training.add_argument("--shortest", type=_count, default=defaults.lengths.shortest, help="shortest history")
    training.add_argument("--longest", type=_count, default=defaults.lengths.longest, help="longest history")
    training.add_argument("--learning-rate", type=_rate, default=defaults.learning_rate)
    training.add_argument("--seed", type=_seed, default=defaults.seed)
    # One by default: two that share their cores with other work wait for each other (measured: a tenth of the speed).
    training.add_argument("--threads", type=_count, default=1, help="of torch")
    evaluation = p.add_argument_group("evaluation")
    evaluation.add_argument("--eval-history", type=_counts, metavar="L,…", help="history lengths of the AUC table")
    evaluation.add_argument("--eval-users", type=_count, default=200, help="without --log: users to evaluate on")
    evaluation.add_argument("--eval-targets", type=_count, default=512, help="without --log: targets of each")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def _task(text: str) -> tuple[str, list[str]]:
    name, _, actions = text.partition("=")
    if not name or not all(actions.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=ACTION,ACTION,…")
    return name, actions.split(",")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive integer")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
