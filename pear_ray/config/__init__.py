"""What a job may set, and how it is read."""

from pear_ray.config.arms import TRAINING_STAGES, Arm, Study, is_after_rl, start_of
from pear_ray.config.base import describe
from pear_ray.config.cooperate import AlternateMethod, BridgeMethod, Cooperate, SumMethod, TrapoMethod
from pear_ray.config.corpus import Columns, Corpus
from pear_ray.config.engines import Generator, Learner, Lora, Rewards, Weights
from pear_ray.config.job import Evaluation, Job, Model, Pretrain, Run, TaskSpec, Tracking
from pear_ray.config.read import read_job
from pear_ray.config.rl import Rl
from pear_ray.config.sft import IwObjective, KlObjective, Optimizer, SedObjective, Sft, TrSftObjective

__all__ = [
    "TRAINING_STAGES",
    "AlternateMethod",
    "Arm",
    "BridgeMethod",
    "Columns",
    "Cooperate",
    "Corpus",
    "Evaluation",
    "Generator",
    "IwObjective",
    "Job",
    "KlObjective",
    "Learner",
    "Lora",
    "Model",
    "Optimizer",
    "Pretrain",
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
    "Weights",
    "describe",
    "is_after_rl",
    "read_job",
    "start_of",
]
