"""A cluster of thousands of replicas in one process: the real routing and scaling policies, everything else made simple."""
