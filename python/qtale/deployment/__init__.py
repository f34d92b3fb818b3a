"""Models that run under a memory budget and follow it.

    deployment = qtale.deploy("model", "6GiB")               # or budget "auto": what is free
    deployment.generate("Gravity is")                        # as deployment.engine.generate does
    deployment.replan("4GiB")                                # changes only the layers whose bits change
    watch(deployment)                                        # follows the free memory until Ctrl-C

The engine in C++ runs what it can; other models, or all with ``backend="torch"``, run as transformers models.
A :class:`Deployment` holds each weight once, in the form it runs in; when bits change, originals are read from disk.
"""

from qtale.deployment.change import DeployReport, ModuleChange
from qtale.deployment.deploy import Deployment, deploy
from qtale.deployment.watch import Watcher, watch

__all__ = ["DeployReport", "Deployment", "ModuleChange", "Watcher", "deploy", "watch"]
