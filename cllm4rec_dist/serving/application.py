"""The Ray Serve application for `serve build`, which hands over no arguments: they are variables of the environment.

    CLLM4REC_RUN=/shared/shop CLLM4REC_REPLICAS=4 serve build cllm4rec_dist.serving.application:application

Each setting of `ServiceOptions` is a variable of its name in capital letters behind `CLLM4REC_`.
"""

from __future__ import annotations

import os

from cllm4rec_dist.serving.app import build
from cllm4rec_dist.serving.options import ServiceOptions

_VARIABLES = {name: f"CLLM4REC_{name.upper()}" for name in ServiceOptions.model_fields}

application = build({name: os.environ[found] for name, found in _VARIABLES.items() if found in os.environ})
