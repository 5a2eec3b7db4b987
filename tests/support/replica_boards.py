"""What the adapter and replica dashboards show."""

from __future__ import annotations

from support.boards import ADAPTER, FIRST, MODEL, REPLICA, Board, Plot, Row, Rows, latencies, quantile, rate

ADAPTERS = Board(
    "slipstream-adapter",
    "Slipstream / Adapter",
    "The busiest adapters of each process; all others are `other`. Needs the metrics key.",
    {"model": "slipstream_adapter_requests_total", "adapter": "slipstream_adapter_requests_total"},
    [
        Row(
            "Use",
            [
                Rows(
                    "Names",
                    'max by (adapter, tenant, name, version) (slipstream_adapter_info{adapter=~"$adapter"})',
                    "What the digests are called.",
                ),
                Plot(
                    "Calls",
                    "reqps",
                    [(rate("adapter_requests_total", "adapter", ADAPTER), "{{adapter}}")],
                    "",
                    True,
                ),
                Plot(
                    "Calls by outcome",
                    "reqps",
                    [(rate("adapter_requests_total", "outcome", ADAPTER), "{{outcome}}")],
                ),
                Plot(
                    "Answer tokens",
                    "short",
                    [(rate("adapter_completion_tokens_total", "adapter", ADAPTER), "{{adapter}}")],
                    "A second.",
                ),
                Plot(
                    "Mean time to first token",
                    "s",
                    [
                        (
                            f"{rate('adapter_time_to_first_token_seconds_sum', 'adapter', ADAPTER)} / "
                            f"{rate('adapter_time_to_first_token_seconds_count', 'adapter', ADAPTER)}",
                            "{{adapter}}",
                        )
                    ],
                    "Streams.",
                ),
            ],
        ),
        Row(
            "Speculation",
            [
                Plot(
                    "Acceptance by position",
                    "percentunit",
                    [
                        (
                            f"{rate('adapter_drafts_accepted_total', 'position', ADAPTER)} / "
                            f"{rate('adapter_drafts_judged_total', 'position', ADAPTER)}",
                            "draft {{position}}",
                        )
                    ],
                    "Share of drafts that were right, of those that were compared.",
                ),
                Plot(
                    "Acceptance of the first draft",
                    "percentunit",
                    [
                        (
                            f"{rate('adapter_drafts_accepted_total', 'adapter', f'{ADAPTER},{FIRST}')} / "
                            f"{rate('adapter_drafts_judged_total', 'adapter', f'{ADAPTER},{FIRST}')}",
                            "{{adapter}}",
                        )
                    ],
                ),
                Plot(
                    "Drafts judged",
                    "short",
                    [(rate("adapter_drafts_judged_total", "adapter", ADAPTER), "{{adapter}}")],
                    "A second.",
                ),
            ],
        ),
        Row(
            "Residency",
            [
                Plot(
                    "Adapters by tier",
                    "short",
                    [(f"sum by (residency) (slipstream_engine_adapters{{{MODEL}}})", "{{residency}}")],
                    "Over all replicas.",
                    True,
                ),
                Plot(
                    "Slots",
                    "short",
                    [
                        (f"sum(slipstream_engine_adapter_slots{{{MODEL}}})", "slots"),
                        (f"sum(slipstream_engine_adapter_slots_free{{{MODEL}}})", "free"),
                        (f"sum(slipstream_engine_adapters_wanted{{{MODEL}}})", "wanted"),
                    ],
                ),
                Plot(
                    "Loads and evictions",
                    "short",
                    [
                        (rate("engine_adapter_loads_total", "outcome", MODEL), "load {{outcome}}"),
                        (rate("engine_adapter_evictions_total", "tier", MODEL), "evicted from {{tier}}"),
                        (rate("engine_adapter_fetches_total", "outcome", MODEL), "fetch {{outcome}}"),
                    ],
                    "A second.",
                ),
                latencies("Fetches", "engine_adapter_fetch_duration_seconds", MODEL, "Download, check and layout."),
            ],
        ),
    ],
)

REPLICAS = Board(
    "slipstream-replica",
    "Slipstream / Replica",
    "One engine replica, or all of them: steps, batch, KV cache, ranks and the process.",
    {"model": "slipstream_engine_steps_total", "replica": "slipstream_engine_steps_total"},
    [
        Row(
            "Work",
            [
                Plot(
                    "Sequences",
                    "short",
                    [
                        (f"slipstream_engine_running_sequences{{{REPLICA}}}", "{{replica}} running"),
                        (f"slipstream_engine_waiting_sequences{{{REPLICA}}}", "{{replica}} waiting"),
                    ],
                ),
                latencies("Queue wait", "engine_queue_wait_seconds", REPLICA, "From arrival to the first step."),
                Plot(
                    "Oldest in the queue",
                    "s",
                    [(f"slipstream_engine_oldest_wait_seconds{{{REPLICA}}}", "{{replica}}")],
                ),
                Plot(
                    "Sequences that come",
                    "short",
                    [(rate("engine_sequences_total", "replica", REPLICA), "{{replica}}")],
                    "A second.",
                ),
                Plot("Steps", "short", [(rate("engine_steps_total", "replica", REPLICA), "{{replica}}")], "A second."),
                latencies("Step", "engine_step_duration_seconds", REPLICA, "The model's part."),
                Plot(
                    "Batch",
                    "short",
                    [(quantile(q, "engine_batch_sequences", REPLICA), f"p{q * 100:g} sequences") for q in (0.5, 0.95)],
                ),
                Plot(
                    "Token budget",
                    "percentunit",
                    [(quantile(q, "engine_budget_fill_ratio", REPLICA), f"p{q * 100:g}") for q in (0.5, 0.95)],
                    "Rows of a step, of those that there might be.",
                ),
                Plot(
                    "Tokens",
                    "short",
                    [
                        (rate("engine_prompt_tokens_total", where=REPLICA), "prompt"),
                        (rate("engine_prefix_hit_tokens_total", where=REPLICA), "prefix hits"),
                        (rate("engine_completion_tokens_total", where=REPLICA), "answer"),
                        (rate("engine_drafted_tokens_total", where=REPLICA), "drafted"),
                        (rate("engine_accepted_tokens_total", where=REPLICA), "accepted"),
                    ],
                    "A second, of ended sequences.",
                ),
            ],
        ),
        Row(
            "Memory",
            [
                Plot(
                    "KV blocks in use",
                    "percentunit",
                    [
                        (
                            f"slipstream_engine_kv_blocks_used{{{REPLICA}}} / slipstream_engine_kv_blocks{{{REPLICA}}}",
                            "{{replica}}",
                        )
                    ],
                ),
                Plot(
                    "Preemptions",
                    "short",
                    [(rate("engine_preemptions_total", "replica", REPLICA), "{{replica}}")],
                    "A second.",
                ),
                Plot(
                    "Adapters",
                    "short",
                    [
                        (
                            f"sum by (replica, residency) (slipstream_engine_adapters{{{REPLICA}}})",
                            "{{replica}} {{residency}}",
                        )
                    ],
                ),
                Plot(
                    "Adapter evictions",
                    "short",
                    [(rate("engine_adapter_evictions_total", "replica, tier", REPLICA), "{{replica}} {{tier}}")],
                    "A second.",
                ),
                Plot("Resident memory", "bytes", [(f"process_resident_memory_bytes{{{REPLICA}}}", "{{replica}}")]),
            ],
        ),
        Row(
            "Health",
            [
                Plot(
                    "Answers",
                    "bool_on_off",
                    [('slipstream_replica_up{role="engine",model=~"$model",replica=~"$replica"}', "{{replica}}")],
                ),
                Plot(
                    "Ranks",
                    "short",
                    [
                        (f"slipstream_engine_ranks{{{REPLICA}}}", "{{replica}}"),
                        (f"slipstream_engine_ranks_up{{{REPLICA}}}", "{{replica}} up"),
                    ],
                ),
                Plot(
                    "Processor",
                    "short",
                    [(f"rate(process_cpu_seconds_total{{{REPLICA}}}[$__rate_interval])", "{{replica}}")],
                    "Cores of the replica's own process.",
                ),
                Plot(
                    "Age",
                    "s",
                    [(f"time() - process_start_time_seconds{{{REPLICA}}}", "{{replica}}")],
                ),
            ],
        ),
    ],
)
