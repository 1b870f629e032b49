"""Which path: prefix features, k-means and product k-means, sharding decisions, the router."""
