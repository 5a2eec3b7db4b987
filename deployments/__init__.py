"""How Slipstream runs on Ray Serve. The only package that imports Ray."""
