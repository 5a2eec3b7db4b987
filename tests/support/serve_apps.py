"""What a Serve application says, so that two can be compared."""

from __future__ import annotations

from typing import Any

from ray.serve import Application


def deployments(application: Application) -> dict[str, Any]:
    """Everything that Serve is told of each deployment."""
    found: dict[str, Any] = {}

    def collect(node: Application) -> None:
        deployment = node._bound_deployment
        config = deployment._deployment_config.model_dump()
        found[deployment.name] = (
            config,
            deployment.ray_actor_options,
            deployment._replica_config.placement_group_bundles,
        )
        arguments = deployment._replica_config.init_args
        for argument in arguments:
            if isinstance(argument, Application):
                collect(argument)
            elif isinstance(argument, dict):
                for value in argument.values():
                    if isinstance(value, Application):
                        collect(value)
            else:
                found[deployment.name] += (argument,)

    collect(application)
    return found
