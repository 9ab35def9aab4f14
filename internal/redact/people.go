package redact

import "strings"

// Rules of people.go, as marks name them.
const (
	cardRule = "payment-card"
	ibanRule = "iban"
)

// people finds numbers of payment cards and bank accounts: those whose length, beginning and check
// digits are right. Groups may be separated by one space or hyphen each.
func people(found []Span, text string) []Span {
	for i := 0; i < len(text); {
		c := text[i]
		if !isDigit(c) && !isLetter(c) {
			i++
			continue
		}
		if to, rule := number(text[i:]); rule != "" {
			found = append(found, Span{i, i + to, rule})
			i += to
			continue
		}
		for i < len(text) && (isDigit(text[i]) || isLetter(text[i])) { // the next one begins after this word
			i++
		}
	}
	return found
}

// numberRule is the rule of a JSON number, or "".
func numberRule(raw string) string {
	if len(raw) < minCard || strings.Trim(raw, "0123456789") != "" {
		return ""
	}
	if to, rule := number(raw); to == len(raw) {
		return rule
	}
	return ""
}

// number returns the end of the number that text begins with, and its rule.
func number(text string) (to int, rule string) {
	if isDigit(text[0]) {
		if to = card(text); to > 0 {
			return to, cardRule
		}
	} else if to = iban(text); to > 0 {
		return to, ibanRule
	}
	return 0, ""
}

func isDigit(c byte) bool  { return c >= '0' && c <= '9' }
func isLetter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }

const (
	minCard = 13
	maxCard = 19
)

// card returns the end of the card number that text begins with, or 0.
func card(text string) int {
	var digits [maxCard]byte
	n, end := 0, 0
	for i := 0; i < len(text) && n < maxCard; i++ {
		c := text[i]
		if (c == ' ' || c == '-') && n > 0 && i+1 < len(text) && isDigit(text[i+1]) && isDigit(text[i-1]) {
			continue
		}
		if !isDigit(c) {
			break
		}
		digits[n] = c - '0'
		n++
		if n >= minCard && (i+1 == len(text) || !isDigit(text[i+1]) && !isLetter(text[i+1])) && issued(digits[:n]) && luhn(digits[:n]) {
			end = i + 1 // of the longest
		}
	}
	return end
}

// issued reports whether a number has a beginning and length that card schemes use (ISO/IEC 7812).
func issued(d []byte) bool {
	four := int(d[0])*1000 + int(d[1])*100 + int(d[2])*10 + int(d[3])
	n := len(d)
	switch {
	case d[0] == 4:
		return n == 13 || n == 16 || n == 19
	case four >= 5100 && four <= 5599, four >= 2221 && four <= 2720:
		return n == 16
	case four/100 == 34, four/100 == 37:
		return n == 15
	case four/100 == 36, four/100 == 38, four/100 == 39, four >= 3000 && four <= 3059:
		return n >= 14
	case four == 6011, four/100 == 65, four >= 6440 && four <= 6499, four/100 == 62, four >= 3528 && four <= 3589, four/100 == 81:
		return n >= 16
	}
	return false
}

// luhn checks the last digit (ISO/IEC 7812-1, annex B).
func luhn(d []byte) bool {
	sum := 0
	for i := range d {
		v := int(d[len(d)-1-i])
		if i%2 == 1 {
			if v *= 2; v > 9 {
				v -= 9
			}
		}
		sum += v
	}
	return sum%10 == 0
}

// ibanLengths are the lengths of account numbers by country (ISO 13616).
const ibanLengths = "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27" +
	"GB22GE22GI23GL18GR27GT28HN28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19MN20MR27MT31MU30" +
	"NI28NL18NO15OM23PK24PL28PS29PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23TN24TR26UA29VA22VG24XK20YE30"

// iban returns the end of the account number that text begins with, or 0.
func iban(text string) int {
	if len(text) < 15 || !isLetter(text[1]) || !isDigit(text[2]) || !isDigit(text[3]) {
		return 0
	}
	country := strings.ToUpper(text[:2])
	want := 0
	for i := 0; i < len(ibanLengths); i += 4 {
		if ibanLengths[i:i+2] == country {
			want = int(ibanLengths[i+2]-'0')*10 + int(ibanLengths[i+3]-'0')
			break
		}
	}
	if want == 0 {
		return 0
	}
	var chars [34]byte
	n := 0
	for i := 0; i < len(text); i++ {
		c := text[i]
		if (c == ' ' || c == '-') && i > 3 && text[i-1] != ' ' && text[i-1] != '-' {
			continue
		}
		if !isDigit(c) && !isLetter(c) {
			return 0
		}
		chars[n] = c
		if n++; n == want {
			if i+1 < len(text) && (isDigit(text[i+1]) || isLetter(text[i+1])) || !mod97(chars[:n]) {
				return 0
			}
			return i + 1
		}
	}
	return 0
}

// mod97 checks the two digits after the country (ISO 7064, MOD 97-10).
func mod97(s []byte) bool {
	sum := 0
	for i := range s {
		c := s[(i+4)%len(s)]
		if isDigit(c) {
			sum = (sum*10 + int(c-'0')) % 97
			continue
		}
		sum = (sum*100 + int(c|0x20-'a') + 10) % 97
	}
	return sum == 1
}
