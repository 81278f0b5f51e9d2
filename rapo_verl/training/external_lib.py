"""Import side effect only: ``model.external_lib`` names this module, which veRL imports before it builds an engine."""

from rapo_verl.training.plugin import register_engines

register_engines()
