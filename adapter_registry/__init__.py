"""The registry: what is published, by whom, under which name. No torch, no Ray, no HTTP, no sibling package."""
