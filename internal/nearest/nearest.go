// Package nearest finds what was probably meant: the known name next to one that was mistyped.
// Start at [Name]. It refuses nothing, needs nothing and is safe for concurrent use.
package nearest

import "strings"

// maxLength bounds the work on hostile names, in bytes: longer ones have no neighbour.
const maxLength = 64

// Name returns the known name closest to got, without regard to case, or "" if none is within two
// edits (three for names longer than six bytes). Of equally close ones the first wins.
func Name(got string, known []string) string {
	best, bestDistance := "", 4
	for _, k := range known {
		allowed := 2
		if len(k) > 6 {
			allowed = 3
		}
		if d := distance(strings.ToLower(got), strings.ToLower(k)); d <= allowed && d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	if len(a) > maxLength || len(b) > maxLength {
		return maxLength
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
