"""The paper's optima and figures, and what estimators and reweighting do. No run may depend on this room."""
