"""Distributed training of CLLM4Rec: LLM recommenders in which every user and every item is a token."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then tells every process of a kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
