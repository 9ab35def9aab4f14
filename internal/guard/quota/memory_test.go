package quota_test

import (
	"testing"

	"newel.dev/newel/internal/guard/quota"
	"newel.dev/newel/internal/store/quotatest"
)

func TestMemory(t *testing.T) { quotatest.Run(t, quota.NewMemory()) }
