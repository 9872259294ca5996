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
from pear_ray.config.errors import format_validation_error
from pear_ray.config.job import (
    Evaluation,
    Generator,
    Job,
    Model,
    ModelSource,
    Placement,
    Pretrain,
    Ranking,
    Rewards,
    Rl,
    Run,
    TaskSpec,
    Tracking,
    Weights,
)
from pear_ray.config.job_file import read_job
from pear_ray.config.secrets import refuse_secrets
from pear_ray.config.sft import Learner, Lora, Optimizer, Sft

__all__ = [
    "LAST_STAGES",
    "TRAINING_STAGES",
    "Arm",
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
    "Optimizer",
    "Placement",
    "Pretrain",
    "Ranking",
    "Rewards",
    "Rl",
    "Run",
    "Sft",
    "Study",
    "TaskSpec",
    "Tracking",
    "Weights",
    "format_validation_error",
    "is_after_rl",
    "last_stage_with",
    "read_job",
    "refuse_secrets",
    "start_of",
]
