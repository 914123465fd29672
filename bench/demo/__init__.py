"""`make demo`: serve and train one model at once under several policies, on the same traffic, with figures."""
