//! Reads the annotated bytes in `format/golden/`.

/// The bytes of a golden file: hexadecimal digits, comments from `#` to the end of the line.
pub(crate) fn golden(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(|line| line.bytes().filter(u8::is_ascii_hexdigit))
        .collect();
    let pairs = digits.chunks(2);
    pairs
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("digits");
            u8::from_str_radix(pair, 16).expect("two digits")
        })
        .collect()
}
