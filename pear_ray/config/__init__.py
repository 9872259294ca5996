"""What a job may say, how it is read, and how its mistakes are told."""

from pear_ray.config.arms import (
    LAST_STAGES,
    TRAINING_STAGES,
    Arm,
    Study,
    is_after_rl,
    last_stage_with,
    start_of,
)
from pear_ray.config.cooperate import Cooperate
from pear_ray.config.corpus import Columns, Corpus, CorpusSample
from pear_ray.config.errors import BadInput, describe
from pear_ray.config.job import (
    Evaluation,
    Generator,
    Job,
    Model,
    ModelSource,
    Placement,
    Pretrain,
    Ranking,
    Rl,
    Run,
    TaskSpec,
    Tracking,
    Verifier,
    Weights,
)
from pear_ray.config.job_file import read_job
from pear_ray.config.secrets import refuse_secrets
from pear_ray.config.sft import Learner, Lora, Optimiser, Sft

__all__ = [
    "LAST_STAGES",
    "TRAINING_STAGES",
    "Arm",
    "BadInput",
    "Columns",
    "Cooperate",
    "Corpus",
    "CorpusSample",
    "Evaluation",
    "Generator",
    "Job",
    "Learner",
    "Lora",
    "Model",
    "ModelSource",
    "Optimiser",
    "Placement",
    "Pretrain",
    "Ranking",
    "Rl",
    "Run",
    "Sft",
    "Study",
    "TaskSpec",
    "Tracking",
    "Verifier",
    "Weights",
    "describe",
    "is_after_rl",
    "last_stage_with",
    "read_job",
    "refuse_secrets",
    "start_of",
]
