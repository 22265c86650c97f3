//! As much of an HTTP/1.1 client as a pod needs, on a blocking stream, so that what is sent is exactly what is meant.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
};

/// An answer, read to its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// By lower-case name; of a repeated one the last.
    pub headers: BTreeMap<String, String>,
    /// The body, with what is not UTF-8 replaced.
    pub body: String,
}

// === impl Reply ===

impl Reply {
    /// Why the agent rejected the request, as it told; empty if it did not.
    #[must_use]
    pub fn reason(&self) -> &str {
        reason(&self.headers)
    }
}

/// The agent's `x-kiam-reason` among `headers`.
pub(super) fn reason(headers: &BTreeMap<String, String>) -> &str {
    headers.get("x-kiam-reason").map_or("", String::as_str)
}

/// Sends `request` as it stands and reads one answer; the stream can be used again where the server allows it.
pub fn exchange(stream: &mut (impl Read + Write), request: &str) -> io::Result<Reply> {
    stream.write_all(request.as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut reply = head(&mut reader)?;
    if request.starts_with("HEAD ") || reply.status == 204 || reply.status == 304 {
        return Ok(reply);
    }
    let mut body = Vec::new();
    if reply.headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
        while let Some(mut chunk) = chunk(&mut reader)? {
            body.append(&mut chunk);
        }
    } else if let Some(length) = reply.headers.get("content-length") {
        body.resize(length.parse().map_err(io::Error::other)?, 0);
        reader.read_exact(&mut body)?;
    } else {
        reader.read_to_end(&mut body)?;
    }
    reply.body = String::from_utf8_lossy(&body).into_owned();
    Ok(reply)
}

/// The status line and the headers; the body is empty yet.
pub fn head(reader: &mut impl BufRead) -> io::Result<Reply> {
    let status = line(reader)?;
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {status:?}"));
    let code = status.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1));
    let status = code.and_then(|code| code.parse().ok()).ok_or_else(invalid)?;
    let mut headers = BTreeMap::new();
    loop {
        let line = line(reader)?;
        if line.is_empty() {
            return Ok(Reply { status, headers, body: String::new() });
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
}

/// One chunk of a chunked body; `None` at its end.
pub fn chunk(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let length = usize::from_str_radix(&line(reader)?, 16).map_err(io::Error::other)?;
    let mut chunk = vec![0; length];
    reader.read_exact(&mut chunk)?;
    line(reader)?;
    Ok((length > 0).then_some(chunk))
}

fn line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}
