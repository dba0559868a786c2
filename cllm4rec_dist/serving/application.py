"""The Ray Serve application for `serve build`, configured by environment variables, as it passes no arguments.

    CLLM4REC_RUN=/shared/shop CLLM4REC_REPLICAS=4 serve build cllm4rec_dist.serving.application:application

Each field of `ServiceOptions` is read from `CLLM4REC_` followed by its name in capital letters.
"""

from __future__ import annotations

import os

from cllm4rec_dist.serving.app import build
from cllm4rec_dist.serving.options import ServiceOptions

_VARIABLES = {name: f"CLLM4REC_{name.upper()}" for name in ServiceOptions.model_fields}

application = build({name: os.environ[variable] for name, variable in _VARIABLES.items() if variable in os.environ})
