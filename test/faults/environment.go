package main

// scenarios are faults of the environment.
func scenarios() []task { return nil }
