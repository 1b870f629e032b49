"""Being written (12:32) by a second engineer with the same brief: take sharding; evaluation, router, features, arrangement are taken."""
