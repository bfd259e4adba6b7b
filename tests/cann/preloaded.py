"""Imported once by the fork server, before any rank is forked. Uses no device."""

import cannsim

cannsim.install()

import torch._dynamo.utils  # noqa: E402
import torch._functorch.aot_autograd  # noqa: E402, F401
import torchair  # noqa: E402, F401

import models  # noqa: E402, F401
