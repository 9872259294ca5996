"""The command line, `pear-ray`; its arguments and exit codes are in USAGE."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from pear_ray import __version__
from pear_ray.config import read_job
from pear_ray.config.reference import help_text
from pear_ray.errors import ConfigError, require
from pear_ray.process import configure_logging

STAGES = {
    "pretrain": "train the job's small models from scratch",
    "sample": "sample a corpus from the behavior policies",
    "score": "compute the behavior policy's log-prob of every response token",
    "sft": "fine-tune under PEAR's importance weights",
    "rl": "train with verified rewards",
    "cooperate": "train on rollouts and offline traces together, instead of rl",
    "evaluate": "measure pass@k of the run's checkpoints on held-out problems",
    "rank": "rank checkpoints as starting points for RL, with confidence",
    "report": "write one HTML page and one table of all results",
    "pipeline": "run all of these in order, for every arm of the job",
    "study": "run every arm with several seeds and compare them",
}

USAGE = f"""usage: pear-ray STAGE JOB.toml [--section.key value ...] [--dry-run | --plan]

stages:
{chr(10).join(f"  {name:<10}{purpose}" for name, purpose in STAGES.items())}

  pear-ray pipeline jobs/laptop.toml            run everything
  pear-ray sft JOB.toml --sft.level block       override a key of the job
  pear-ray sft JOB.toml --study.seeds 0 1 2     several values are a list
  pear-ray sft JOB.toml --rl.record             set a boolean; --rl.no-record clears it
  pear-ray sft JOB.toml --help                  every key with its value in this job
  pear-ray pipeline JOB.toml --dry-run          check the job and print it, without a cluster
  pear-ray pipeline JOB.toml --plan             number and size of the GPUs it needs
  pear-ray --version                            the version

A finished stage is skipped. Exit codes: 0 done, 2 bad input, 130 interrupted, 1 anything else."""

HELP = {"-h", "--help"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    try:
        sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))
    except ConfigError as error:
        print(f"pear-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run_command(arguments: Sequence[str]) -> int:
    """Run a command line without its program name and return the exit code; raise ConfigError if the stage, the job
    file or an override is invalid."""
    if arguments and arguments[0] == "--version":
        print(f"pear-ray {__version__}")
        return 0
    if not arguments or HELP & set(arguments[:2]):
        print(USAGE)
        return 0
    stage, *rest = arguments
    require(stage in STAGES, "stage", f"one of {', '.join(STAGES)}", repr(stage))
    if not rest:
        raise ConfigError(f"job: missing; expected a job file: pear-ray {stage} JOB.toml")
    path, *words = rest
    job = read_job(Path(path), [word for word in words if word not in HELP | {"--dry-run", "--plan"}])
    if HELP & set(words):
        print(f"{USAGE}\n\nkeys, with their values in {path}:\n\n{help_text(job)}")
        return 0
    if "--plan" in words:
        print(importlib.import_module("pear_ray.plan").plan(job))
        return 0
    configure_logging(job.tracking.logs, "%(asctime)s %(message)s", datefmt="%H:%M:%S")
    importlib.import_module("pear_ray.preflight").check_inputs(job, stage)
    if "--dry-run" in words:
        print(job.model_dump_json(indent=2))
        return 0
    # Imported late: a mistake in the job is reported before Ray and torch are loaded.
    with importlib.import_module("pear_ray.run").open_run(job) as run:
        run.run_stage(stage, importlib.import_module("pear_ray.pipeline").load_stage(stage))
    return 0


if __name__ == "__main__":
    main()
