package postgres

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// A sized argument says how much room it and those after it take when they are encoded. The driver
// would find out by copying all of it again and again.
type sized struct {
	value any
	bytes int
}

// roomFor sets a statement's first argument to make room for all of them.
func roomFor(bytes int, args []any) []any {
	args[0] = sized{args[0], bytes}
	return args
}

// encodeSized has connections take sized arguments.
func encodeSized(_ context.Context, conn *pgx.Conn) error {
	m := conn.TypeMap()
	m.TryWrapEncodePlanFuncs = append([]pgtype.TryWrapEncodePlanFunc{
		func(value any) (pgtype.WrappedEncodePlanNextSetter, any, bool) {
			s, ok := value.(sized)
			return &sizedPlan{}, s.value, ok
		},
	}, m.TryWrapEncodePlanFuncs...)
	return nil
}

type sizedPlan struct{ next pgtype.EncodePlan }

// SetNext implements pgtype.WrappedEncodePlanNextSetter.
func (p *sizedPlan) SetNext(next pgtype.EncodePlan) { p.next = next }

// Encode implements pgtype.EncodePlan.
func (p *sizedPlan) Encode(value any, buf []byte) ([]byte, error) {
	s, ok := value.(sized)
	if !ok {
		return nil, fmt.Errorf("an unexpected argument %T", value)
	}
	return p.next.Encode(s.value, slices.Grow(buf, s.bytes))
}
