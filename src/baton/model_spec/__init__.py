"""What a checkpoint is, read from its JSON files alone: no weight is opened here, and no torch.

`load_model_spec` turns `config.json` (and `generation_config.json`) into a `ModelSpec`. A field
that would change the computation and that Baton does not implement is refused by name; a field
that the reference implementation of the architecture ignores is ignored here as well. A missing
field has the default that `transformers` gives it.
"""

from baton.model_spec.config_json import load_model_spec
from baton.model_spec.spec import DTYPE_BYTES, ModelSpec, RopeSpec

__all__ = ["DTYPE_BYTES", "ModelSpec", "RopeSpec", "load_model_spec"]
