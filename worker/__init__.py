"""One machine's loop: lease, fetch, inner steps or scoring, submit, leave."""
