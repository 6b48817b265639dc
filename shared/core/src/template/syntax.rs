//! Parses a template once, into a flat list of text, placeholders and conditions. No recursion, so nesting can't exhaust the stack.

use super::TemplateError;

/// The maximum length of a tag. Longer ones are not legitimate.
const MAX_TAG_BYTES: usize = 500;
/// The maximum number of `{% elif %}` in one text.
const MAX_ELIFS: usize = 50;
/// The maximum nesting of `{% if %}`.
const MAX_IFS: usize = 100;

/// A field of a recipient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    Name,
    Email,
    UnsubscribeUrl,
}

impl Field {
    fn named(word: &str) -> Option<Self> {
        match word {
            "name" => Some(Self::Name),
            "email" => Some(Self::Email),
            "unsubscribe_url" => Some(Self::UnsubscribeUrl),
            _ => None,
        }
    }
}

/// Which optional fields a recipient has. They decide every condition and default; the address is always there.
#[derive(Clone, Copy, Debug)]
pub struct Present {
    pub name: bool,
    pub unsubscribe_url: bool,
}

/// The output for one kind of recipient, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Piece<'a> {
    /// The author's text.
    Text(&'a str),
    /// The recipient's value, never empty.
    Value(Field),
    /// A literal from a default.
    Default(&'a str),
}

/// A parsed source text.
#[derive(Debug)]
pub struct Source<'a> {
    nodes: Vec<Node<'a>>,
}

#[derive(Debug)]
enum Node<'a> {
    Text(&'a str),
    Value(Expression),
    If(Condition),
    Elif(Condition),
    Else,
    Endif,
}

/// The first operand that is not empty. `a or b` and `a | default(b)` are the same.
#[derive(Debug)]
struct Expression(Vec<Operand>);

#[derive(Debug)]
enum Operand {
    Field(Field),
    Literal(String),
}

/// Holds if the expression is not empty, or if it is empty (`not`).
#[derive(Debug)]
struct Condition {
    expression: Expression,
    negated: bool,
}

/// An open `{% if %}`.
struct Branch {
    /// The text around it is shown.
    outer: bool,
    /// An earlier branch was shown.
    taken: bool,
    /// The current branch is shown.
    shown: bool,
}

impl Source<'_> {
    /// The output for recipients with these fields.
    pub fn pieces(&self, present: Present) -> Vec<Piece<'_>> {
        let mut pieces = Vec::with_capacity(self.nodes.len());
        let mut open: Vec<Branch> = Vec::new();
        for node in &self.nodes {
            let shown = open.last().is_none_or(|branch| branch.shown);
            match node {
                Node::Text(text) if shown => pieces.push(Piece::Text(text)),
                Node::Value(expression) if shown => pieces.push(expression.value(present)),
                Node::Text(_) | Node::Value(_) => {}
                Node::If(condition) => {
                    let shown_within = shown && condition.holds(present);
                    open.push(Branch { outer: shown, taken: shown_within, shown: shown_within });
                }
                Node::Elif(condition) => {
                    if let Some(branch) = open.last_mut() {
                        branch.shown = branch.outer && !branch.taken && condition.holds(present);
                        branch.taken |= branch.shown;
                    }
                }
                Node::Else => {
                    if let Some(branch) = open.last_mut() {
                        branch.shown = branch.outer && !branch.taken;
                    }
                }
                Node::Endif => {
                    open.pop();
                }
            }
        }
        pieces
    }
}

impl Expression {
    fn value(&self, present: Present) -> Piece<'_> {
        self.0.iter().find(|operand| !operand.is_empty(present)).map_or(Piece::Default(""), |operand| match operand {
            Operand::Field(field) => Piece::Value(*field),
            Operand::Literal(text) => Piece::Default(text),
        })
    }
}

impl Operand {
    fn is_empty(&self, present: Present) -> bool {
        match self {
            Self::Field(Field::Name) => !present.name,
            Self::Field(Field::UnsubscribeUrl) => !present.unsubscribe_url,
            Self::Field(Field::Email) => false,
            Self::Literal(text) => text.is_empty(),
        }
    }
}

impl Condition {
    fn holds(&self, present: Present) -> bool {
        self.negated == self.expression.0.iter().all(|operand| operand.is_empty(present))
    }
}

/// Parses `source`. `is_subject` affects only the wording of errors.
///
/// # Errors
/// The first mistake, with its position.
pub fn parse(source: &str, is_subject: bool) -> Result<Source<'_>, TemplateError> {
    let error = |at: usize, what: &str| {
        let line = source[..at].matches('\n').count() + 1;
        TemplateError(if is_subject {
            format!("the subject {what}")
        } else {
            format!("line {line} of the text {what}")
        })
    };
    let mut nodes = Vec::new();
    // The position of each open {% if %}, and whether its {% else %} was seen.
    let mut open: Vec<(usize, bool)> = Vec::new();
    let mut elifs = 0;
    let mut done = 0;
    let mut trims_next = false;
    loop {
        let tag = next_tag(source, done);
        let at = tag.map_or(source.len(), |(at, _)| at);
        let mut text = &source[done..at];
        if trims_next {
            text = text.trim_start();
        }
        let Some((_, [begin, end])) = tag else {
            nodes.push(Node::Text(text));
            break;
        };
        let rest = &source[at + begin.len()..];
        let length = if begin == "{#" {
            rest.find(end)
        } else {
            length(rest, end).map_err(|character| error(at, &format!("has {character} after {begin}")))?
        };
        if begin != "{#" && length.unwrap_or(rest.len()) > MAX_TAG_BYTES {
            return Err(error(at, &format!("has more than {MAX_TAG_BYTES} characters after {begin}")));
        }
        let length = length.ok_or_else(|| error(at, &format!("is not understood: {begin} without {end}")))?;
        done = at + begin.len() + length + end.len();
        let content = &rest[..length];
        if content.starts_with('-') {
            text = text.trim_end();
        }
        trims_next = content.len() > 1 && content.ends_with('-');
        nodes.push(Node::Text(text));
        let content = content.strip_prefix(['-', '+']).unwrap_or(content);
        let content = content.strip_suffix(['-', '+']).unwrap_or(content).trim();
        if begin == "{{" {
            nodes.push(Node::Value(value(content).map_err(|what| error(at, &what))?));
        } else if begin == "{%" {
            let node = statement(content).map_err(|what| error(at, &what))?;
            match &node {
                Node::If(_) => open.push((at, false)),
                Node::Elif(_) if open.last().is_some_and(|(_, had_else)| !had_else) => elifs += 1,
                Node::Else if open.last().is_some_and(|(_, had_else)| !had_else) => {
                    if let Some((_, had_else)) = open.last_mut() {
                        *had_else = true;
                    }
                }
                Node::Endif if open.pop().is_some() => {}
                _ => return Err(error(at, &format!("is not understood: {{% {content} %}} without {{% if %}}"))),
            }
            nodes.push(node);
            if elifs > MAX_ELIFS {
                return Err(error(at, &format!("has more than {MAX_ELIFS} times {{% elif %}}")));
            }
            if open.len() > MAX_IFS {
                return Err(error(
                    at,
                    &format!("has too much recursion: more than {MAX_IFS} {{% if %}} in each other"),
                ));
            }
        }
    }
    match open.first() {
        Some((at, _)) => Err(error(*at, "is not understood: {% if %} without {% endif %}")),
        None => Ok(Source { nodes }),
    }
}

/// The position of the next tag, and its delimiters.
fn next_tag(source: &str, from: usize) -> Option<(usize, [&'static str; 2])> {
    source[from..].match_indices('{').find_map(|(index, _)| {
        let at = from + index;
        let marks = match source.as_bytes().get(at + 1)? {
            b'{' => ["{{", "}}"],
            b'%' => ["{%", "%}"],
            b'#' => ["{#", "#}"],
            _ => return None,
        };
        Some((at, marks))
    })
}

/// The length of a tag, up to an `end` outside of quotes. None: it does not end.
///
/// # Errors
/// A character that is not allowed in a tag.
fn length(tag: &str, end: &str) -> Result<Option<usize>, char> {
    let (mut quote, mut escaped) = (None, false);
    for (index, character) in tag.char_indices() {
        match quote {
            _ if std::mem::take(&mut escaped) => {}
            Some(_) if character == '\\' => escaped = true,
            Some(open) if character == open => quote = None,
            Some(_) => {}
            None if tag[index..].starts_with(end) => return Ok(Some(index)),
            None if matches!(character, '\'' | '"') => quote = Some(character),
            None if matches!(character, '*' | '{') => return Err(character),
            None => {}
        }
    }
    Ok(None)
}

/// Parses the content between `{%` and `%}`. An error is the end of a sentence about its position.
fn statement<'a>(content: &str) -> Result<Node<'a>, String> {
    let end = content.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(content.len());
    let (word, rest) = content.split_at(end);
    match word {
        "if" => condition(rest).map(Node::If),
        "elif" => condition(rest).map(Node::Elif),
        "else" if rest.is_empty() => Ok(Node::Else),
        "endif" if rest.is_empty() => Ok(Node::Endif),
        "else" | "endif" => Err(format!("is not understood: unexpected {} after {word}", rest.trim())),
        _ => Err(format!("has {{% {word} %}}; only if, elif, else and endif are known")),
    }
}

fn condition(text: &str) -> Result<Condition, String> {
    let mut tokens = Tokens { rest: text };
    let negated = tokens.take_word("not");
    let expression = expression(&mut tokens)?;
    match tokens.next() {
        None => Ok(Condition { expression, negated }),
        Some(_) => {
            Err(format!("has the condition {}; only a placeholder, or not and a placeholder, can be one", text.trim()))
        }
    }
}

fn value(text: &str) -> Result<Expression, String> {
    let mut tokens = Tokens { rest: text };
    let expression = expression(&mut tokens)?;
    tokens.next().map_or(Ok(expression), |token| Err(unexpected(&token)))
}

/// Parses an `operand`, then any number of `or operand` and `| default(operand)`.
fn expression(tokens: &mut Tokens<'_>) -> Result<Expression, String> {
    let mut operands = vec![operand(tokens)?];
    loop {
        if tokens.take_word("or") {
            operands.push(operand(tokens)?);
        } else if tokens.take_symbol('|') {
            match tokens.next() {
                Some(Token::Word("default")) => {}
                Some(Token::Word(word)) => {
                    return Err(format!("is not understood: filter {word} is unknown; the only filter is default"));
                }
                _ => return Err("is not understood: no filter after |; the only filter is default".into()),
            }
            if tokens.take_symbol('(') && !tokens.take_symbol(')') {
                operands.push(operand(tokens)?);
                if !tokens.take_symbol(')') {
                    return Err("is not understood: default( without )".into());
                }
            }
        } else if tokens.take_symbol('.') {
            return Err("uses a value that does not exist".into());
        } else {
            return Ok(Expression(operands));
        }
    }
}

fn operand(tokens: &mut Tokens<'_>) -> Result<Operand, String> {
    match tokens.next() {
        Some(Token::Literal(text)) => Ok(Operand::Literal(text)),
        Some(token @ Token::Word("or" | "not" | "and" | "if" | "else" | "in" | "is")) => Err(unexpected(&token)),
        Some(Token::Word(word)) => Field::named(word)
            .map(Operand::Field)
            .ok_or_else(|| format!("has the placeholder {word}; known are name, email and unsubscribe_url")),
        Some(token) => Err(unexpected(&token)),
        None => Err("is not understood: a placeholder is missing".into()),
    }
}

fn unexpected(token: &Token<'_>) -> String {
    let token = match token {
        Token::Word(word) => (*word).to_owned(),
        Token::Literal(text) => format!("'{text}'"),
        Token::Symbol(symbol) => symbol.to_string(),
    };
    format!("is not understood: unexpected {token}")
}

#[derive(Debug, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Literal(String),
    Symbol(char),
}

/// Splits a tag into tokens.
struct Tokens<'a> {
    rest: &'a str,
}

impl<'a> Tokens<'a> {
    fn next(&mut self) -> Option<Token<'a>> {
        self.rest = self.rest.trim_start();
        let first = self.rest.chars().next()?;
        if matches!(first, '\'' | '"') {
            return Some(Token::Literal(self.literal(first)));
        }
        let is_of_word = |c: char| c.is_alphanumeric() || c == '_';
        let end = self.rest.find(|c| !is_of_word(c)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(if end == 0 { first.len_utf8() } else { end });
        self.rest = rest;
        Some(if end == 0 { Token::Symbol(first) } else { Token::Word(token) })
    }

    /// A quoted literal. A backslash escapes the next character.
    fn literal(&mut self, quote: char) -> String {
        let mut text = String::new();
        let mut characters = self.rest[quote.len_utf8()..].chars();
        while let Some(character) = characters.next() {
            match character {
                '\\' => text.extend(characters.next().map(|escaped| match escaped {
                    'n' => '\n',
                    't' => '\t',
                    escaped => escaped,
                })),
                character if character == quote => break,
                character => text.push(character),
            }
        }
        self.rest = characters.as_str();
        text
    }

    fn take_word(&mut self, word: &str) -> bool {
        self.take(&Token::Word(word))
    }

    fn take_symbol(&mut self, symbol: char) -> bool {
        self.take(&Token::Symbol(symbol))
    }

    fn take(&mut self, wanted: &Token<'_>) -> bool {
        let before = self.rest;
        let taken = self.next().is_some_and(|token| token == *wanted);
        if !taken {
            self.rest = before;
        }
        taken
    }
}
