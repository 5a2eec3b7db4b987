"""One replica's batch engine. Imports neither Ray nor Redis nor HTTP; runs on torch >= 2.11 and transformers >= 5.17."""
