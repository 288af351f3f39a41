"""What watches find as metrics for Prometheus: docs/prometheus.md."""
