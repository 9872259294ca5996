"""What a job may set, and how it is read."""
# ruff: noqa: F401

from pear_ray.config.base import describe
from pear_ray.config.engines import Generator, Learner, Lora, Rewards
from pear_ray.config.job import TRAINING_STAGES, Arm, Job, Model, Pretrain, TaskSpec, Tracking, is_after_rl, start_of
from pear_ray.config.read import read_job
from pear_ray.config.rl import AlternateMethod, BridgeMethod, Cooperate, Rl, SumMethod, TrapoMethod
from pear_ray.config.sft import Columns, IwObjective, KlObjective, Optimizer, SedObjective, Sft, TrSftObjective
