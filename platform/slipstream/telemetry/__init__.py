"""What a request leaves behind for people who look after the platform: log lines and spans. No prompts, no keys."""
