-- Dissector of vhost-user messages as "vhostuser trace --pcapng" writes them; printed by "vhostuser trace --dissector".
--
-- The tables come from the catalog of messages; the code below them only follows them. Fields of a payload are called
-- vhostuser.PAYLOAD.FIELD.

--@catalog@
local HEAD = 48
local HEADER = 12
local FLAGS = {from_backend = 1, backend_channel = 2, reply = 4, awaits = 8, refused = 16, big_endian = 32}
local NONE = 0xffffffff
local NO_SIZE = UInt64(0xffffffff, 0xffffffff)

local vhostuser = Proto("vhostuser", "vhost-user")
local fields, made = {}, {}

local function field(kind, name, title, ...)
  table.insert(made, ProtoField[kind]("vhostuser." .. name, title, ...))
  return made[#made]
end

local function declare(name, kind, title, ...)
  fields[name] = field(kind, name, title, ...)
end

-- What the tracer saw.
declare("version", "uint8", "Version of the encapsulation")
declare("from", "string", "Sender")
declare("channel", "string", "Socket")
declare("connection", "uint32", "Connection")
declare("at", "uint64", "Since the trace began, ns")
declare("held", "uint64", "In the tracer, ns")
declare("latency", "uint64", "Since the request, ns")
declare("answers", "framenum", "Answers", base.NONE, frametype.REQUEST)
declare("awaits", "bool", "Awaits an answer")
declare("refused", "bool", "Refuses")
declare("fd", "string", "Descriptor")
declare("fd.kind", "string", "Kind")
declare("fd.size", "uint64", "Size")
declare("fd.detail", "string", "Detail")
declare("ring", "string", "Changes")
declare("violation", "string", "Breaks a rule")
declare("violation.section", "string", "See")
declare("fault", "string", "On purpose")
-- The message.
declare("name", "string", "Message")
declare("request", "uint32", "Request")
declare("flags", "uint32", "Flags", base.HEX)
declare("flags.version", "uint32", "Version", base.DEC, nil, 0x3)
declare("flags.reply", "bool", "Reply", 32, nil, 0x4)
declare("flags.need_reply", "bool", "Need reply", 32, nil, 0x8)
declare("size", "uint32", "Size of the payload")
declare("payload", "string", "Payload")
declare("body", "bytes", "Payload of no layout that is known")
declare("bit", "string", "Bit")

local violated = ProtoExpert.new("vhostuser.expert.violation", "A rule is broken", expert.group.PROTOCOL,
  expert.severity.ERROR)
local meddled = ProtoExpert.new("vhostuser.expert.fault", "On purpose", expert.group.PROTOCOL, expert.severity.NOTE)
local cut = ProtoExpert.new("vhostuser.expert.cut", "The packet ends too early", expert.group.MALFORMED,
  expert.severity.ERROR)
vhostuser.experts = {violated, meddled, cut}

-- ---- fields of payloads

local KINDS = {number = {[1] = "uint8", [2] = "uint16", [4] = "uint32", [8] = "uint64"}, signed = {[8] = "int64"}}

local function snake(name)
  return (name:gsub("(%l)(%u)", "%1_%2"):lower())
end

-- Gives each part of a layout its field.
local function prepare(parts, prefix)
  for _, part in ipairs(parts) do
    local name = part.name ~= "" and prefix .. "." .. part.name or prefix
    local title = part.name ~= "" and part.name or "value"
    if part.form == "index" then
      part.field = field("uint64", name, title, base.DEC, nil, 0xff)
      part.fd_field = field("bool", prefix .. ".has_fd", "has_fd")
    elseif part.form == "bytes" then
      part.field = field("bytes", name, title)
    elseif part.form == "group" then
      part.field = part.parts[1].name ~= "" and field("bytes", name, title) or nil
      prepare(part.parts, name)
    elseif part.form ~= "padding" then
      local numbers = part.hex and base.HEX or base.DEC
      part.field = field(KINDS[part.form][part.size], name, title, numbers)
    end
  end
end

for name, layout in pairs(catalog.layouts) do
  layout.filter = snake(name)
  prepare(layout.parts, layout.filter)
end

vhostuser.fields = made

-- ---- reading

local function has(flags, flag)
  return flags % (2 * flag) >= flag
end

local function put(tree, what, range, big)
  return big and tree:add(what, range) or tree:add_le(what, range)
end

-- Bytes of those parts whose size is fixed.
local function fixed(parts)
  local sum = 0
  for _, part in ipairs(parts) do sum = sum + (part.size or 0) end
  return sum
end

local show

local function group(part, range, tree, big)
  local each = fixed(part.parts)
  for at = 0, range:len() - each, each do
    local one = range(at, each)
    show(part.parts, one, part.field and tree:add(part.field, one):set_text(part.name) or tree, big)
  end
end

show = function(parts, range, tree, big)
  local at, spare = 0, range:len() - fixed(parts)
  for _, part in ipairs(parts) do
    local size = part.size or spare
    if size > 0 then
      local piece = range(at, size)
      if part.form == "group" then
        group(part, piece, tree, big)
      elseif part.form == "bytes" then
        tree:add(part.field, piece)
      elseif part.form == "index" then
        put(tree, part.field, piece, big)
        local word = big and piece:uint64() or piece:le_uint64()
        tree:add(part.fd_field, piece, word:lower() % 512 < 256)
      elseif part.form ~= "padding" then
        put(tree, part.field, piece, big)
      end
    end
    at = at + size
  end
end

-- Does a layout fit a payload? One whose last part repeats has its count in front.
local function fits(layout, size, range, big)
  if size < layout.first or size > layout.last or (size - layout.first) % layout.step ~= 0 then return false end
  local last = layout.parts[#layout.parts]
  if not last or last.times ~= 0 then return true end
  local count = big and range(0, 4):uint() or range(0, 4):le_uint()
  return fixed(layout.parts) + count * fixed(last.parts) == size
end

-- Which of its layouts this payload has. An answer is an acknowledgement where the message has no reply of its own, or
-- where it has one only under some condition.
local function choose(message, reply, size, range, big)
  local names = {}
  for _, name in ipairs(reply and message.reply or message.request) do table.insert(names, name) end
  if reply then table.insert(names, "U64") end
  for _, name in ipairs(names) do
    if fits(catalog.layouts[name], size, range, big) then return name end
  end
end

local function show_flags(kind, range, tree, big)
  local value = big and range:uint64() or range:le_uint64()
  local words = {}
  for bit = 0, 63 do
    local half = bit < 32 and value:lower() or value:higher()
    if has(half, 2 ^ (bit % 32)) then table.insert(words, catalog.flags[kind][bit] or "bit" .. bit) end
  end
  for _, word in ipairs(words) do tree:add(fields.bit, range, word) end
  return table.concat(words, " ")
end

local function show_payload(message, reply, range, tree, big)
  local size = range and range:len() or 0
  local name = message and choose(message, reply, size, range, big)
  if not name then
    if range then tree:add(fields.body, range) end
    return ""
  end
  local layout, words = catalog.layouts[name], ""
  local below = range and tree:add(fields.payload, range, name) or tree:add(fields.payload, name)
  if range then show(layout.parts, range, below, big) end
  if message.flags and name == "U64" and (not reply or #message.reply > 0) then
    words = show_flags(message.flags, range, below, big)
  end
  return words
end

-- ---- the tracer's header

local function texts(range)
  local whole = range:raw()
  local first, second = whole:match("^(.-)%z(.*)$")
  return first or whole, second or ""
end

local SHOWN = {
  function(range, tree)
    local kind, detail = texts(range(8))
    local size = range(0, 8):le_uint64()
    local words = kind .. (size ~= NO_SIZE and " " .. tostring(size) .. " bytes" or "")
    local below = tree:add(fields.fd, range, words .. (detail ~= "" and ", " .. detail or ""))
    below:add(fields["fd.kind"], range, kind)
    if size ~= NO_SIZE then below:add_le(fields["fd.size"], range(0, 8)) end
    if detail ~= "" then below:add(fields["fd.detail"], range, detail) end
  end,
  function(range, tree)
    local section, reason = texts(range)
    local below = tree:add(fields.violation, range, reason)
    below:add(fields["violation.section"], range, section)
    below:add_proto_expert_info(violated, reason .. " (see " .. section .. ")")
  end,
  function(range, tree) tree:add(fields.ring, range, (texts(range))) end,
  function(range, tree)
    local fault = texts(range)
    tree:add(fields.fault, range, fault):add_proto_expert_info(meddled, "on purpose: " .. fault)
  end,
}

local function show_items(range, tree)
  local at = 0
  while at + 4 <= range:len() do
    local kind, size = range(at, 1):uint(), range(at + 2, 2):le_uint()
    if at + 4 + size > range:len() then return false end
    if SHOWN[kind] and size > 0 then SHOWN[kind](range(at + 4, size), tree) end
    at = at + 4 + size
  end
  return true
end

local function show_head(buffer, tree, flags)
  tree:add_le(fields.version, buffer(0, 1))
  tree:add(fields.from, buffer(1, 1), has(flags, FLAGS.from_backend) and "back-end" or "front-end")
  tree:add(fields.channel, buffer(1, 1), has(flags, FLAGS.backend_channel) and "backend" or "main")
  tree:add(fields.awaits, buffer(1, 1), has(flags, FLAGS.awaits))
  tree:add(fields.refused, buffer(1, 1), has(flags, FLAGS.refused))
  tree:add_le(fields.connection, buffer(8, 4))
  tree:add_le(fields.at, buffer(16, 8))
  tree:add_le(fields.held, buffer(40, 8))
  local answers = buffer(24, 4):le_uint()
  if answers > 0 then
    tree:add(fields.answers, buffer(24, 4), answers)
    tree:add_le(fields.latency, buffer(32, 8))
  end
end

local function show_header(range, tree, big)
  put(tree, fields.request, range(0, 4), big)
  local flags = put(tree, fields.flags, range(4, 4), big)
  for _, bit in ipairs({"version", "reply", "need_reply"}) do put(flags, fields["flags." .. bit], range(4, 4), big) end
  put(tree, fields.size, range(8, 4), big)
end

local function known(code, flags)
  local channel = has(flags, FLAGS.backend_channel) and "backend" or "main"
  return code ~= NONE and catalog.messages[channel][code] or nil
end

function vhostuser.dissector(buffer, pinfo, root)
  pinfo.cols.protocol = "vhost-user"
  local tree = root:add(vhostuser, buffer())
  local length = buffer:len() >= HEAD and buffer(4, 4):le_uint() or 0
  if length < HEAD or buffer:len() < length + HEADER then
    tree:add_proto_expert_info(cut)
    return
  end
  local flags = buffer(1, 1):uint()
  local big, reply = has(flags, FLAGS.big_endian), has(flags, FLAGS.reply)
  local seen = tree:add(buffer(0, length), "As the tracer saw it")
  show_head(buffer, seen, flags)
  if length > HEAD and not show_items(buffer(HEAD, length - HEAD), seen) then seen:add_proto_expert_info(cut) end

  local header = buffer(length, HEADER)
  local code = buffer(12, 4):le_uint()
  local message = known(code, flags)
  local name = message and message.name or "request " .. (big and header(0, 4):uint() or header(0, 4):le_uint())
  tree:add(fields.name, header, name)
  show_header(header, tree, big)
  local at = length + HEADER
  local words = show_payload(message, reply, buffer:len() > at and buffer(at) or nil, tree, big)
  pinfo.cols.src = has(flags, FLAGS.from_backend) and "back-end" or "front-end"
  pinfo.cols.dst = has(flags, FLAGS.from_backend) and "front-end" or "back-end"
  pinfo.cols.info = name .. (reply and " reply" or "") .. (words ~= "" and ": " .. words or "")
end

DissectorTable.get("wtap_encap"):add(wtap.USER0, vhostuser)
