"""What Prometheus is told: the catalogue of metrics, who counts what, and the page that answers for all processes."""
