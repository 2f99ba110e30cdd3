"""The KV memory of each tier, and the copies between the tiers."""
