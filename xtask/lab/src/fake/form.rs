//! `application/x-www-form-urlencoded`, in bodies and in queries.

use std::collections::BTreeMap;

/// The fields of `text`; of a repeated one the last.
pub(super) fn parse(text: &str) -> BTreeMap<String, String> {
    text.split('&')
        .filter(|field| !field.is_empty())
        .map(|field| {
            let (name, value) = field.split_once('=').unwrap_or((field, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => decoded.push(b' '),
            b'%' => {
                let (high, low) = (bytes.next().and_then(hex), bytes.next().and_then(hex));
                // What is not two hex digits is shown as the replacement character.
                decoded.push(high.zip(low).map_or(0xff, |(high, low)| high << 4 | low));
            }
            other => decoded.push(other),
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    u8::try_from(char::from(digit).to_digit(16)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone() {
        let fields = parse("RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fa&Empty&Name=a+b");
        assert_eq!(fields["RoleArn"], "arn:aws:iam::1:role/a");
        assert_eq!(fields["Empty"], "");
        assert_eq!(fields["Name"], "a b");
    }
}
