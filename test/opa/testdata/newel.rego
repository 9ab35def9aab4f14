package newel

default decision := {"verdict": "deny", "rule": "default", "reason": "no rule allows this"}

decision := {"verdict": "allow", "rule": "reads"} if input.capability.effect == "read"

decision := {"verdict": "allow", "rule": "ops refund"} if {
	may_refund
	input.args.amount <= 100
}

decision := {"verdict": "require_approval", "rule": "large refunds"} if {
	may_refund
	input.args.amount > 100
}

may_refund if {
	input.capability.name == "refund"
	"ops" in input.principal.roles
}

visible := [c.name | some c in input.capabilities; shown(c)]

shown(c) if c.effect == "read"

shown(c) if {
	c.name == "refund"
	"ops" in input.principal.roles
}

yes := true

no := false

number := 1

other := {"verdict": "perhaps"}

nothing if input.principal.id == "nobody at all"
