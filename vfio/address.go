package vfio

import (
	"fmt"
	"regexp"
	"strings"
)

// Address is a PCI function's address, "0000:41:00.0": domain, bus, device,
// function, lower-case hexadecimal. The zero value is none.
type Address string

// ParseAddress reads an address. Upper case and a missing domain, as lspci
// prints it, are understood; anything else is an error.
func ParseAddress(text string) (Address, error) {
	address := strings.ToLower(text)
	if strings.Count(address, ":") == 1 {
		address = "0000:" + address
	}
	if !regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`).MatchString(address) {
		return "", fmt.Errorf("PCI address %q: want domain:bus:device.function, for instance 0000:41:00.0", text)
	}
	return Address(address), nil
}

// Slot is the address without its function number.
func (a Address) Slot() string {
	slot, _, _ := strings.Cut(string(a), ".")
	return slot
}
