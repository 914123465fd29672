"""The durable ledger of accepted work, files and jobs, in memory or in Redis."""
