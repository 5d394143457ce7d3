"""How the engine's loop spends its time between two steps; for the engine and its twin."""

from __future__ import annotations

STEP_TIME_WEIGHT = 0.1
"""Of the newest step in the moving average that `WorkerLoad.step_s` tells."""

SEAL_WAIT_SHARE = 0.1
"""Of a step's usual time, how long the engine waits for the copies of blocks for handoffs."""
