"""From a command line to the resolved config of a run: veRL's config, ours on top, one experiment, overrides."""

import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rapo_verl import Refused
from rapo_verl.method.config import RapoConfig
from rapo_verl.run.values import leaves

PARENT = "rapo"
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
# In recipe/experiment/cpu.yaml: vLLM's model in its core's process, unless it is shared out.
OmegaConf.register_new_resolver("vllm_executor", lambda ranks: "uni" if ranks == 1 else "mp", replace=True)


def recipe_dir() -> Path:
    """Return the folder of the recipes, which is there if the package was installed with its clone."""
    folder = Path(__file__).resolve().parents[2] / "recipe"
    if not (folder / f"{PARENT}.yaml").is_file():
        raise Refused(
            f"no recipes at {folder}: install from a clone with `pip install --no-deps -e .`, which keeps recipe/ "
            "beside rapo_verl/"
        )
    return folder


def experiments() -> list[str]:
    """Return the names that ``experiment=`` takes."""
    return sorted(path.stem for path in (recipe_dir() / "experiment").glob("*.yaml"))


def compose_config(overrides: list[str]) -> DictConfig:
    """Return the resolved config of a run, its paths absolute, from Hydra's overrides as typed."""
    # Looked up without importing verl, which takes seconds.
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise Refused("veRL is not installed; run `make install`, then `rapo doctor`")
    verl_config = Path(spec.origin).parent / "trainer" / "config"
    ConfigStore.instance().store(group="rapo", name="schema", node=_schema())
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(recipe_dir()), version_base=None, job_name="rapo"):
        config = compose(PARENT, [*overrides, f"hydra.searchpath=[file://{verl_config}]"], return_hydra_config=True)
        choice = config.hydra.runtime.choices.get("experiment")
    with open_dict(config):
        del config["hydra"]
        if OmegaConf.is_missing(config, "run_dir"):
            config.run_dir = f"runs/{choice or 'rapo'}"
        config.recipe_dir = str(recipe_dir())
        for key in ("run_dir", "toy_dir", "real_dir", "data_dir", "trainer.resume_from_path"):
            if value := OmegaConf.select(config, key):
                OmegaConf.update(config, key, str(Path(value).absolute()))
        if config.trainer.experiment_name == "gsm8k":  # veRL's default
            config.trainer.experiment_name = choice or "rapo"
        loggers = config.trainer.logger or []
        # Progress bar, watchdog and curves read this file: a run without it would be taken for one that hangs.
        config.trainer.logger = list(dict.fromkeys([*([loggers] if isinstance(loggers, str) else loggers), "file"]))
    OmegaConf.resolve(config)
    return config


def compose_or_refuse(overrides: list[str]) -> DictConfig:
    """Return what `compose_config` does; what Hydra or OmegaConf have against the overrides is Refused."""
    try:
        return compose_config(overrides)
    except CONFIG_ERRORS as error:
        raise Refused(_told(str(error))) from error


def _told(said: str) -> str:
    """Return what Hydra says of an override; of a key that is not there the nearest ones, not its advice to add it."""
    missing = re.match(r"Could not override '([^']+)'", said)
    if missing:
        known = [key for key, _ in leaves(OmegaConf.to_container(compose_config([])))]
        near = get_close_matches(missing[1], known, n=3)
        mend = f"did you mean {' or '.join(near)}?" if near else "a key of your own code takes a + before it"
        return f"{missing[1]} is no setting; {mend}"
    strange = re.match(r"Lexer\w*: (.*)", said)
    if strange:
        return f"{strange[1]!r} is no override; allowed: key=value, +key=value, ~key, each one word of the shell"
    return said


def _schema() -> DictConfig:
    """Return `RapoConfig` as a typed node that experiments may still change: OmegaConf freezes frozen dataclasses."""
    schema = OmegaConf.structured(RapoConfig)
    for node in (schema, *filter(OmegaConf.is_config, schema.values())):
        OmegaConf.set_readonly(node, False)
    return schema
