"""Stage `rl`: reinforcement learning. Both sides of the loop are on this page.

    rollout_loop(), a thread of the driver           train_policy(), every learner rank

    RolloutScheduler --prompts--> EnginePool         take(step) <--------- BatchQueue <--+
      ^       |                       | completions      | RolloutBatch                  |
      |       |                       v                  v                               |
      +-------|------ grades --- RewardPool          TrainStep: loss, gradient, AdamW    |
              |                                          |                               |
              |  EnginePool <-- PolicyVersions <---- publish(step + 1)                   |
              +-- StepBatch -------------------------------------------------------------+

Engines are vLLM actors, learners a Ray Train run of DeepSpeed ranks. Two small actors link them: the registry
(`PolicyVersions`) knows the newest weights, the queue (`BatchQueue`) holds batches. With `rl.max_staleness = 0` the
sides take turns and every token is on-policy; with k > 0 they overlap: sampling is up to k steps ahead, and completions
in flight go on under new weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer
from pear_ray.rl.evaluation import Evaluation
from pear_ray.rl.monitor import RunMonitor
from pear_ray.rl.recording import replay, write_batch, write_sample
from pear_ray.rl.rollouts import BatchSender, EngineWeights, Link, RolloutStage, Workers, rare_gc
from pear_ray.rl.train_step import ParityCheck, PolicyGradientStep, RankConfig, TrainStep, WeightPublisher
from pear_ray.run import RunDir, connect
from pear_ray.train.hf_folder import check_supported
from pear_ray.train.ray_train import PreemptionWatcher, run_ray_train, setup_worker


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Run the stage; return the facts for the manifest."""
    return run_rl(RolloutStage.of(job, run, "rl"), PolicyGradientStep)


def run_rl(stage: RolloutStage, make_train_step: Callable[[RankConfig], TrainStep]) -> dict[str, Any]:
    """Start both sides and wait for the learners. Stage `cooperate` has another scheduler and another TrainStep."""
    job, run_dir = stage.job, stage.run.folder
    check_supported(job, stage.start_model)
    connect()
    generate = generate_rollouts if job.rl.replay is None else replay
    with ThreadPoolExecutor(1) as executor, Link.start() as link:
        rollouts = executor.submit(generate, stage, link)
        config = RankConfig(job, run_dir, stage.name, stage.start_model, link.registry, link.queue)
        train, storage = partial(train_policy, make_train_step), stage.folder / f"{run_dir.name}-{stage.name}"
        facts = run_ray_train(train, config, job.learner, job.placement.learners, storage)
    if not facts:
        rollouts.result()  # raises the error that ended them
    return facts


def generate_rollouts(stage: RolloutStage, link: Link) -> None:
    """Start engines and reward workers, then run the rollout loop."""
    with link.close_queue_on_error(), Workers.start(stage) as workers:
        rollout_loop(stage, workers, link)


@rare_gc()
def rollout_loop(stage: RolloutStage, workers: Workers, link: Link) -> None:
    """Pass on prompts, completions, grades, batches and weights until the learners have finished. No call here blocks;
    the scheduler bounds how far sampling runs ahead."""
    first = link.wait_first_version(stage.job.learner.timeout_seconds)
    if first is None:
        return
    job, start_model = stage.job, stage.start_model
    pool, reference, reward_pool = workers.pool, workers.reference, workers.reward_pool
    first_step = first.versions[-1].version
    scheduler = stage.make_scheduler(job, start_model, first_step, first.next_problem)
    evaluation = Evaluation(job, start_model)
    tokenizer = load_tokenizer(start_model)
    weights, sender = EngineWeights(stage, pool, link, first), BatchSender(link.queue)
    while not link.finished.is_set():
        # Grades first: which prompts are due may depend on them.
        for key, grades in reward_pool.pop_finished(0.0):
            (evaluation if evaluation.has(key) else scheduler).add_rewards(key, grades)
        while (batch := scheduler.pop_batch()) is not None:
            rollouts = weights.measure(batch, evaluation.pop_finished())
            write_sample(stage.folder / "samples", batch, tokenizer.decode(batch.groups[0].prompt_ids))
            if job.rl.record:
                write_batch(stage.folder / "rollouts", batch)
            sender.send(rollouts)
        pool.submit(weights.update(evaluation))
        if not evaluation.is_running:
            pool.submit(scheduler.next_requests(weights.version))
        for key, prefilled in scheduler.take_prefilled():
            reward_pool.submit(key, prefilled)
        for key, completions in pool.pop_finished():
            if evaluation.has(key):
                reward_pool.submit(key, evaluation.add_completions(key, completions))
            elif reference:
                reference.submit(key, scheduler.prompt_ids(key), completions)
            else:
                reward_pool.submit(key, scheduler.add_completions(key, completions))
        for key, completions in reference.pop_finished() if reference else ():
            reward_pool.submit(key, scheduler.add_completions(key, completions))
        weights.recover(evaluation)
        pool.autoscale(is_awaited=sender.poll())
        workers.wait(weights.pending_call)


def train_policy(make_train_step: Callable[[RankConfig], TrainStep], config: RankConfig) -> dict[str, Any]:
    """Run a rank: take each step's batch, train on it, publish the new weights. Return {} if the rollouts failed."""
    job = config.job
    setup_worker(job, config.stage)
    train_step = make_train_step(config)
    learner = train_step.learner
    first_step, next_problem = train_step.resume()
    monitor = RunMonitor(config, first_step)
    publisher = WeightPublisher(config, train_step)
    parity, preemption = ParityCheck(job, learner), PreemptionWatcher()
    publisher.publish(first_step, next_problem)
    step, stop_reason = first_step - 1, None
    for step in range(first_step, job.rl.steps):
        begin = time.perf_counter()
        rollouts = publisher.take(step)
        if rollouts is None:
            return {}
        taken = time.perf_counter()
        gap = parity.check(step, rollouts)
        metrics, micro_batches = train_step.train(step, rollouts)
        trained = time.perf_counter()
        next_problem = rollouts.batch.next_problem
        num_bytes = publisher.publish(step + 1, next_problem)
        end = time.perf_counter()
        row: dict[str, Any] = rollouts.metrics | metrics
        row |= {"wait_seconds": taken - begin, "step_seconds": end - begin}
        row |= {"train_seconds": trained - taken, "publish_seconds": end - trained}
        if rollouts.evaluations:
            newest = max(rollouts.evaluations)
            row |= {"eval_version": newest, **rollouts.evaluations[newest]}
        row |= {"logprob_parity_max": gap, "published_mib_per_rank": num_bytes / 2**20}
        stop_reason = monitor.record(step, row, micro_batches)
        monitor.keep_best(learner, step + 1, rollouts.evaluations)
        if stop_reason:
            break
        is_due = (step + 1) % job.learner.save_every == 0 and step + 1 < job.rl.steps
        if preemption.any_new() or is_due:
            publisher.drop_before(train_step.save(step + 1, next_problem))
    learner.export(config.folder / "export", config.start_model)
    monitor.close()
    return {"steps": step + 1, "problems": next_problem, "ended_early": stop_reason}
