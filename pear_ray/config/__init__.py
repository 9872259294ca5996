"""What a job may set, and how it is read."""

from pear_ray.config.arms import (
    LAST_STAGES,
    TRAINING_STAGES,
    Arm,
    Study,
    is_after_rl,
    last_stage_with,
    start_of,
)
from pear_ray.config.base import describe
from pear_ray.config.cooperate import (
    AlternateMethod,
    BridgeMethod,
    Cooperate,
    SumMethod,
    TrapoMethod,
)
from pear_ray.config.corpus import Columns, Corpus, CorpusSample
from pear_ray.config.engines import Generator, Learner, Lora, Placement, Rewards, Weights
from pear_ray.config.job import (
    Evaluation,
    Job,
    Model,
    ModelSource,
    Pretrain,
    Ranking,
    Run,
    TaskSpec,
    Tracking,
)
from pear_ray.config.read import read_job
from pear_ray.config.rl import NftLoss, Rl, TruncatedSampling
from pear_ray.config.sft import (
    IwObjective,
    KlObjective,
    Optimizer,
    SedObjective,
    Sft,
    TrSftObjective,
)

__all__ = [
    "LAST_STAGES",
    "TRAINING_STAGES",
    "AlternateMethod",
    "Arm",
    "BridgeMethod",
    "Columns",
    "Cooperate",
    "Corpus",
    "CorpusSample",
    "Evaluation",
    "Generator",
    "IwObjective",
    "Job",
    "KlObjective",
    "Learner",
    "Lora",
    "Model",
    "ModelSource",
    "NftLoss",
    "Optimizer",
    "Placement",
    "Pretrain",
    "Ranking",
    "Rewards",
    "Rl",
    "Run",
    "SedObjective",
    "Sft",
    "Study",
    "SumMethod",
    "TaskSpec",
    "TrSftObjective",
    "Tracking",
    "TrapoMethod",
    "TruncatedSampling",
    "Weights",
    "describe",
    "is_after_rl",
    "last_stage_with",
    "read_job",
    "start_of",
]
