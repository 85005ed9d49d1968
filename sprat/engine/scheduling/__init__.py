"""Who runs next: a fair queue of tenants, and the scheduler that gives slots and blocks to their requests."""
