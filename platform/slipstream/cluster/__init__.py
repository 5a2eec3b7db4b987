"""Policies of many replicas: where a request goes and how many replicas there are. Pure Python, like the scheduler."""
