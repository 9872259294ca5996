"""The command line: `pear-ray STAGE JOB.toml [--section.key value ...] [--dry-run | --plan]`.

Exit codes: 0 done; 2 bad input, with a message that says where; 1 anything else.
"""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import tyro
from pydantic import ValidationError

from pear_ray.config import Job, format_validation_error, read_job, refuse_secrets
from pear_ray.errors import ConfigError
from pear_ray.logs import configure_logging

STAGES = {
    "pretrain": "make the models which the job wants made from nothing",
    "sample": "write a corpus with the behavior policies of the job",
    "score": "log-probability of every response token under the policy that wrote it",
    "sft": "supervised fine-tuning under PEAR's importance weights",
    "rl": "reinforcement learning on verified answers",
    "cooperate": "reinforcement learning and the corpus's traces at once, instead of rl",
    "evaluate": "pass@k of the run's checkpoints on held-out problems",
    "rank": "from which checkpoint RL should start, and how sure that is",
    "report": "one HTML page and one table of everything the run measured",
    "pipeline": "all of these in order, for every arm of the job",
    "study": "the same, every arm with several seeds, and what their differences are worth",
}

# Words that only look at a job.
LOOKS = ("--dry-run", "--plan")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script, with the words of its own command line or with these."""
    try:
        sys.exit(command(sys.argv[1:] if arguments is None else arguments))
    except ConfigError as error:
        print(f"pear-ray: {error}", file=sys.stderr)
        sys.exit(2)


def command(arguments: list[str]) -> int:
    """Run one command line without its program name.

    Raises:
        ConfigError: the stage, the job file or an override cannot be used.
        SystemExit: tyro refused an override (code 2), or help was asked for (code 0).
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    stage, *rest = arguments
    if stage not in STAGES:
        raise ConfigError(f"stage: read {stage!r}; expected one of {', '.join(STAGES)}")
    if not rest:
        raise ConfigError(
            f"job: missing; expected the path of a job file: pear-ray {stage} JOB.toml"
        )
    if rest[0] in ("-h", "--help"):
        print(usage())
        return 0
    path, *overrides = rest
    looks = [word for word in overrides if word in LOOKS]
    job = resolve(stage, Path(path), [word for word in overrides if word not in LOOKS])
    if "--plan" in looks:
        print(importlib.import_module("pear_ray.plan").plan(job))
        return 0
    configure_logging(job.tracking.logs, "%(asctime)s %(message)s", datefmt="%H:%M:%S")
    importlib.import_module("pear_ray.preflight").check_inputs(job, stage)
    if looks:
        print(job.model_dump_json(indent=2))
        return 0
    with importlib.import_module("pear_ray.run").open_run(job) as run:
        run.run_stage(stage, importlib.import_module("pear_ray.pipeline").stage(stage))
    return 0


def resolve(stage: str, path: Path, overrides: list[str]) -> Job:
    """The job of a file, with the overrides of the command line laid over it.

    Raises:
        ConfigError: the file or the result says something a job cannot say.
    """
    job = read_job(path)
    if not overrides:
        return job
    given = dict(pair for pair in pairwise(overrides) if pair[0].startswith("--"))
    given |= dict(word.split("=", 1) for word in overrides if "=" in word)
    refuse_secrets("command line", given)
    try:
        laid_over = tyro.cli(
            Job,
            prog=f"pear-ray {stage} {path}",
            default=job,
            args=overrides,
            config=(tyro.conf.AvoidSubcommands,),
        )
        return Job.model_validate(laid_over.model_dump())
    except ValidationError as error:
        where = f"{path} with {' '.join(overrides)}"
        raise ConfigError(format_validation_error(where, error, Job)) from error


def usage() -> str:
    """What the bare command says."""
    stages = "\n".join(f"  {name:<10}{purpose}" for name, purpose in STAGES.items())
    return f"""usage: pear-ray STAGE JOB.toml [--section.key value ...] [--dry-run | --plan]

stages:
{stages}

  pear-ray pipeline jobs/laptop.toml            run everything
  pear-ray sft JOB.toml --sft.level block       override a key of the job
  pear-ray sft JOB.toml --help                  every key, with its value in this job
  pear-ray pipeline JOB.toml --dry-run          check the job and print it, without a cluster
  pear-ray pipeline JOB.toml --plan             how many GPUs of which size it needs, and for what

A finished stage is not repeated. Exit codes: 0 done, 2 bad input, 1 anything else."""


if __name__ == "__main__":
    main()
