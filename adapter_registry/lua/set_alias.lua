-- With aliases.lua.
-- ARGV: alias; version, 'back' to where it was before its last move, or '' to remove it; who; when; entries to keep; the
-- adapter's name; audit entries to keep; split as JSON, or ''; guard as JSON, or ''.
-- Answers {1, version or 0, then digests: one that requests now go to and the one that they went to before, ...}, or {0} when
-- there is no such version, or nothing to go back to or remove.
local was = digest_of(redis.call('HGET', KEYS[2], ARGV[1]))
local version = ARGV[2]
if version == 'back' then
  local last  -- for aliases that were moved before there was KEYS[3]
  -- Asked again, because the answer was lost? Then it has gone back already, and must not go forth.
  for _, line in ipairs(redis.call('LRANGE', KEYS[4], 0, 20)) do
    local move = cjson.decode(line)
    if move.alias == ARGV[1] then
      if move.by == ARGV[3] and move.at == ARGV[4] then return {1, move.version} end
      if not last and move.before and move.before ~= move.version then last = string.format('%d', move.before) end
    end
  end
  version = version_before(ARGV[1]) or last
  if not version then return {0} end
end
local by = {who = ARGV[3], at = ARGV[4], moves_kept = ARGV[5], name = ARGV[6], audit_kept = ARGV[7]}
if not move_alias(ARGV[1], version, ARGV[8], ARGV[9], by) then return {0} end
local answer = {1, tonumber(version) or 0}
local part = ARGV[8] ~= '' and cjson.decode(ARGV[8]) or {}
for _, number in ipairs({version, part.version}) do
  local coming = digest_of(number)
  if coming and was and coming ~= was then
    answer[#answer + 1] = coming
    answer[#answer + 1] = was
  end
end
return answer
